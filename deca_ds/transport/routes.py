"""Who sends which elements to whom: rules from the layout of the clients alone.

    what all ranks of a client have alike    a rank hears from one rank of every other client
    a chunk of a block                       a rank exchanges with those that hold what it holds, and that alone

Between clients of one size both mean the rank of the same index, and a chunk is a slice of the shard. Where sizes
differ a chunk is an interval of the block, the same for all clients, of which a rank holds a part (intersections.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deca_ds.launch import ClientLayout
from deca_ds.transport.intersections import Chunk, Range, cuts, held


@dataclass(frozen=True)
class Routes:
    """Those of one rank. layout: which rank is of which client."""

    layout: ClientLayout
    rank: int

    @property
    def _size(self) -> int:
        """Ranks of this one's client."""
        return len(self.layout.ranks_of(self.layout.client_of(self.rank)))

    @property
    def _shard(self) -> int:
        return self.layout.shard_of(self.rank)

    def peers(self, clients: Sequence[int]) -> list[int]:
        """All ranks of `clients` that this one's group joins, itself included, client by client."""
        return [rank for client in clients for rank in self.layout.partners(self.rank, client)]

    def source(self, client: int) -> int:
        """The rank of another client that this one hears what is alike from."""
        ranks = self.layout.ranks_of(client)
        return ranks[self._shard % len(ranks)]

    def hearers(self, client: int) -> Sequence[int]:
        """The ranks of another client that hear what is alike from this one: those of which it is the `source`."""
        return self.layout.ranks_of(client)[self._shard :: self._size]

    def chunks(self, numels: Sequence[int], step: int) -> list[Chunk]:
        """A block of parameters of `numels` elements, in chunks of at most `step` elements of this rank.

        All ranks that exchange have as many; where sizes differ, parts of this rank's may be empty.
        """
        if not self.layout.even:
            sizes = sorted({len(self.layout.ranks_of(client)) for client in range(self.layout.clients)})
            return cuts(numels, self._size, self._shard, sizes, step)
        numel = sum(stop - start for start, stop in held(numels, self._size, self._shard))
        return [self.whole(start, min(start + step, numel)) for start in range(0, numel, step)]

    def whole(self, start: int, stop: int) -> Chunk:
        """Elements of the shard that, between clients of one size, the rank of the same index holds too."""
        return Chunk(slice(start, stop), {self._size: [(self._shard, [(0, stop - start)])]})

    def meets(self, chunk: Chunk, client: int) -> list[tuple[int, Sequence[Range]]]:
        """The ranks of another client that hold any of this rank's part of a chunk, each with what: ranges of the part,
        counted from its start."""
        ranks = self.layout.ranks_of(client)
        return [(ranks[shard], ranges) for shard, ranges in chunk.meets[len(ranks)]]

    def shares(self, numel: int, client: int) -> list[tuple[int, slice]]:
        """The ranks of another client that hold any of this rank's slice of a parameter of `numel` elements, each with
        the place in the slice of what both hold. Ranks meet pairwise in one order."""
        every = self.chunks([numel], max(1, numel))
        return [(rank, slice(*part)) for one in every for rank, ranges in self.meets(one, client) for part in ranges]

    def edge(self, client: int) -> list[int]:
        """The ranks of another client that hold any of what this one holds of a large parameter."""
        ranks, own, shard = self.layout.ranks_of(client), self._size, self._shard
        return [
            rank
            for place, rank in enumerate(ranks)
            if shard * len(ranks) < (place + 1) * own and place * own < (shard + 1) * len(ranks)
        ]

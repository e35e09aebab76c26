"""Who sends which elements to whom; this follows from the layout of the clients alone.

    values that all ranks of a client share    a rank receives them from one rank of every other client
    a chunk of a block                         a rank exchanges only with ranks that hold some of the same elements, and
                                               only these elements

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
    """The routes of one rank. layout: which rank belongs to which client."""

    layout: ClientLayout
    rank: int

    @property
    def _size(self) -> int:
        """Number of ranks of this rank's client."""
        return len(self.layout.ranks_of(self.layout.client_of(self.rank)))

    @property
    def _shard(self) -> int:
        return self.layout.shard_of(self.rank)

    def peers(self, clients: Sequence[int]) -> list[int]:
        """Return all ranks of `clients` in this rank's group, itself included, client by client."""
        return [rank for client in clients for rank in self.layout.partners(self.rank, client)]

    def source(self, client: int) -> int:
        """Return the rank of another client from which this one receives shared values."""
        ranks = self.layout.ranks_of(client)
        return ranks[self._shard % len(ranks)]

    def hearers(self, client: int) -> Sequence[int]:
        """Return the ranks of another client that receive shared values from this one, their `source`."""
        return self.layout.ranks_of(client)[self._shard :: self._size]

    def chunks(self, numels: Sequence[int], step: int) -> list[Chunk]:
        """Return the chunks of a block, of at most `step` elements of this rank each. numels: elements of each
        parameter.

        All ranks that exchange have the same number of chunks; where sizes differ, this rank's part may be empty.
        """
        if not self.layout.even:
            sizes = sorted({len(self.layout.ranks_of(client)) for client in range(self.layout.clients)})
            return cuts(numels, self._size, self._shard, sizes, step)
        numel = sum(stop - start for start, stop in held(numels, self._size, self._shard))
        return [self.whole(start, min(start + step, numel)) for start in range(0, numel, step)]

    def whole(self, start: int, stop: int) -> Chunk:
        """Return elements [start, stop) of the shard as one chunk, between clients of one size, where the rank of the
        same index holds the same elements."""
        return Chunk(slice(start, stop), {self._size: [(self._shard, [(0, stop - start)])]})

    def meets(self, chunk: Chunk, client: int) -> list[tuple[int, Sequence[Range]]]:
        """Return the ranks of another client that hold any of this rank's part of a chunk, each with the ranges that it
        holds, counted from the start of the part."""
        ranks = self.layout.ranks_of(client)
        return [(ranks[shard], ranges) for shard, ranges in chunk.meets[len(ranks)]]

    def shares(self, numel: int, client: int) -> list[tuple[int, slice]]:
        """Return the ranks of another client that hold any of this rank's slice of a parameter of `numel` elements,
        each with the part of the slice that both hold. Any two ranks list their common parts in the same order."""
        every = self.chunks([numel], max(1, numel))
        return [(rank, slice(*part)) for one in every for rank, ranges in self.meets(one, client) for part in ranges]

    def edge(self, client: int) -> list[int]:
        """Return the ranks of another client that hold any element that this rank holds of a large parameter."""
        ranks, own, shard = self.layout.ranks_of(client), self._size, self._shard
        return [
            rank
            for place, rank in enumerate(ranks)
            if shard * len(ranks) < (place + 1) * own and place * own < (shard + 1) * len(ranks)
        ]

"""Messages between clients of different sizes: each rank exchanges with those ranks that hold what it holds.

The way is one transport of all ranks, addressed by their numbers in the job. On it,

    what all ranks of a client have alike (collectives)   a rank hears from one rank of every other client
    an interval of a block (`UnevenTransport.cut`)        a rank exchanges intersections.Cut.meets, packed

so that Gossip's chunks, their order and their weights stay what they are between clients of one size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deca_ds.errors import GossipError, MessageError
from deca_ds.launch.launcher import ClientLayout, Launch
from deca_ds.launch.progress import Progress
from deca_ds.transport import transport as shared
from deca_ds.transport.checksums import Exchange
from deca_ds.transport.gloo import GlooTransport
from deca_ds.transport.intersections import Cut, Range, cuts
from deca_ds.transport.transport import PointToPoint, Result


def torch_between_ranks(store: dist.Store, launch: Launch, timeout_s: float) -> GlooTransport:
    """GlooTransport of all ranks, for UnevenTransport. Raises GossipError if one does not come."""
    with all_ranks_join(launch, timeout_s):
        return GlooTransport(store, 0, launch.rank, launch.world_size, timeout_s)


@contextmanager
def all_ranks_join(launch: Launch, timeout_s: float) -> Iterator[None]:
    """The body connects all ranks; its GossipErrors then say so."""
    try:
        yield
    except GossipError:
        raise GossipError(
            f"not all {launch.world_size} ranks joined gossip within {timeout_s:g} s",
            where=f"rank {launch.rank}",
            fix="look at the output of the other ranks; on several networks set GLOO_SOCKET_IFNAME",
        ) from None


class UnevenTransport(PointToPoint):
    """See Transport; and `cut`.

    ranks: a transport whose "clients" are all ranks of the job. In the collectives all ranks of a client give the same.
    If `ranks` outlives dead clients (elastic/commit.py), this one does too; `members` of both are the clients then.
    """

    def __init__(self, ranks: PointToPoint, layout: ClientLayout):
        self.rank, self.layout, self.ranks = ranks.client, layout, ranks
        super().__init__(layout.client_of(self.rank), layout.clients)
        self.may_lose_clients = ranks.may_lose_clients
        if self.may_lose_clients:
            self.membership = ranks.membership
        self.shard = layout.shard_of(self.rank)
        self._cut: Cut | None = None

    def together(self, work: Callable[[], Result], *, last: bool = False) -> Result:
        """See Transport."""
        return self.ranks.together(work, last=last)

    @property
    def epoch(self) -> int:
        """See Transport."""
        return self.ranks.epoch

    @property
    def progress(self) -> Progress:
        """See Transport."""
        return self._progress

    @progress.setter
    def progress(self, progress: Progress) -> None:
        self._progress = progress
        self.ranks.progress = _ByClient(progress, self.layout)

    @contextmanager
    def cut(self, cut: Cut) -> Iterator[None]:
        """Exchanges in the body are of this interval: of its part, what the other client's ranks hold of it."""
        self._cut = cut
        try:
            yield
        finally:
            self._cut = None

    def _exchange(
        self, send: Tensor, destinations: Sequence[int], receives: Mapping[int, Tensor], tag: int
    ) -> UnevenExchange:
        """See PointToPoint."""
        if self._cut is not None:
            return self._exchange_cut(self._cut, send, destinations, receives, tag)
        size = len(self.layout.ranks_of(self.client))
        to = [rank for j in destinations for rank in self.layout.ranks_of(j)[self.shard :: size]]
        buffers = {}
        for j, buffer in receives.items():
            sources = self.layout.ranks_of(j)
            buffers[sources[self.shard % len(sources)]] = buffer
        return self.between_ranks(send, to, buffers, tag)

    def between_ranks(
        self, send: Tensor, destinations: Sequence[int], receives: Mapping[int, Tensor], tag: int
    ) -> UnevenExchange:
        """See Transport."""
        exchange = UnevenExchange(self.layout)
        exchange.start(self.ranks, send, destinations, receives, tag)
        self.bytes_sent += send.nbytes * len(destinations)
        return exchange

    def _exchange_cut(
        self, cut: Cut, send: Tensor, destinations: Sequence[int], receives: Mapping[int, Tensor], tag: int
    ) -> UnevenExchange:
        assert send.shape == (cut.numel,), f"{tuple(send.shape)} is not the part of {cut.numel} elements"
        exchange = UnevenExchange(self.layout)
        for j, buffer in receives.items():
            for rank, ranges in self._meets(cut, j):
                if len(ranges) == 1:
                    packed = buffer[slice(*ranges[0])]
                else:
                    packed = torch.empty(sum(b - a for a, b in ranges), dtype=buffer.dtype)
                    exchange.packed.append((packed, buffer, ranges))
                exchange.start(self.ranks, packed, [], {rank: packed}, tag)
        pieces: dict[tuple[int, int], Tensor] = {}  # clients of one size meet alike: packed once
        for j in destinations:
            for place, (rank, ranges) in enumerate(self._meets(cut, j)):
                key = (len(self.layout.ranks_of(j)), place)
                if key not in pieces:
                    parts = [send[a:b] for a, b in ranges]
                    pieces[key] = parts[0] if len(parts) == 1 else torch.cat(parts)
                exchange.start(self.ranks, pieces[key], [rank], {}, tag)
                self.bytes_sent += pieces[key].nbytes
        return exchange

    def _meets(self, cut: Cut, j: int) -> list[tuple[int, Sequence[Range]]]:
        ranks = self.layout.ranks_of(j)
        return [(ranks[shard], ranges) for shard, ranges in cut.meets[len(ranks)]]

    def cuts(self, numels: Sequence[int], step: int) -> list[Cut]:
        """A block of parameters of `numels` elements in intervals of `step`, as this rank and the others hold it."""
        sizes = {len(self.layout.ranks_of(j)) for j in range(self.clients)}
        return cuts(numels, len(self.layout.ranks_of(self.client)), self.shard, sorted(sizes), step)

    def partners(self, numel: int, j: int) -> list[tuple[int, slice]]:
        """See Transport."""
        whole = self.cuts([numel], max(1, numel))
        return [(rank, slice(*part)) for cut in whole for rank, ranges in self._meets(cut, j) for part in ranges]

    def sum_slices(
        self, numels: Sequence[int], held: Sequence[int], values: Callable[[int, slice], Tensor]
    ) -> Iterator[tuple[int, slice, Tensor]]:
        """See Transport. Everybody gets everything: n-1 times its slice is what a rank sends, n/2 times what it sends
        among clients of one size."""

        def pieces() -> Iterator[tuple[tuple[int, slice, Tensor], Iterator[None]]]:
            for number, numel in enumerate(numels):
                for cut in self.cuts([numel], max(1, shared.REDUCE_PIECE // self.clients)):
                    piece = values(number, cut.part)
                    yield (number, cut.part, piece), self._sum_cut(cut, piece)

        return shared.in_stages(pieces())

    def _sum_cut(self, cut: Cut, piece: Tensor) -> Iterator[None]:
        """Sum over clients, in place; pauses when messages have been started."""
        terms = {j: torch.empty_like(piece) for j in self._others}
        with self.cut(cut):
            exchange = self.exchange(piece, self._others, terms, shared.REDUCE_TAG)
        yield
        exchange.wait()
        terms[self.client] = piece.clone()
        piece.zero_()
        for j in self.members.clients:
            piece.add_(terms[j])

    def close(self) -> None:
        """See Transport."""
        self.ranks.close()


class UnevenExchange:
    """Messages of one UnevenTransport.exchange. packed: received values, the buffer that they belong to, and where."""

    def __init__(self, layout: ClientLayout):
        self._layout = layout
        self._started: list[Exchange] = []
        self.packed: list[tuple[Tensor, Tensor, Sequence[Range]]] = []

    def start(
        self, ranks: PointToPoint, send: Tensor, destinations: Sequence[int], receives: Mapping[int, Tensor], tag: int
    ) -> None:
        """Add messages."""
        with self._naming_ranks():
            self._started.append(ranks.exchange(send, destinations, receives, tag))

    def test(self) -> bool:
        """See Exchange."""
        with self._naming_ranks():
            return all([exchange.test() for exchange in self._started])

    def wait(self) -> None:
        """See Exchange."""
        with self._naming_ranks():
            for exchange in self._started:
                exchange.wait()
        for values, buffer, ranges in self.packed:
            for part, (a, b) in zip(values.split([b - a for a, b in ranges]), ranges, strict=True):
                buffer[a:b] = part
        self._started, self.packed = [], []

    @contextmanager
    def _naming_ranks(self) -> Iterator[None]:
        """The transport of ranks takes them for clients; whoever reads its errors must not."""

        def name(found: re.Match[str]) -> str:
            return f"rank {found[1]} (client {self._layout.client_of(int(found[1]))})"

        try:
            yield
        except MessageError as error:
            texts = (error.what, error.where, error.fix)
            what, where, fix = (re.sub(r"client (\d+)", name, text or "") for text in texts)
            raise MessageError(what, where=where, fix=fix) from None


class _ByClient(Progress):
    """Hands on for which client a rank is waited for."""

    def __init__(self, progress: Progress, layout: ClientLayout):
        self._progress, self._of = progress, layout

    def wait_for(self, awaits: int | str | None) -> None:
        self._progress.wait_for(self._of.client_of(awaits) if isinstance(awaits, int) else awaits)

    def tick(self) -> None:
        self._progress.tick()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._progress, name)

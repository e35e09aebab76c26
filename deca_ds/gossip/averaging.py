"""Gossip: the weighted mean x_i <- sum_j W_ij x_j of flat float32 shards, chunk by chunk.

    for c, chunk in enumerate(gossip.chunks(shard.numel())):
        local step on shard[chunk]
        pending.append(gossip.start(t, shard[chunk], c))
        if len(pending) == window: absorb(pending.pop(0).wait())
    for mix in pending: absorb(mix.wait())

Chunks travel while later ones are computed. At most `window` of them are under way, so receive buffers take at most
window * degree * chunk_mib, and they are used again. With clipping (clip.py) there is no window: the mean of any chunk
takes the distance over all of them. Nor is there one where late neighbours are left out (stragglers.py), or where
clients may die (elastic/commit.py): an averaging then counts as a whole or is done again without them, so the means of
all chunks are kept. In all three cases `settle` comes before the first `wait`. A damaged message is not averaged, and a
mean is handed on only if all values that it is made of are finite.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from deca_ds.errors import DivergedMessageError, GossipError, MessageError
from deca_ds.gossip.buffers import BufferPool, Outputs
from deca_ds.gossip.clip import clipped_weights, squared_distance
from deca_ds.gossip.late import without
from deca_ds.gossip.mean import not_finite, weighted_mean
from deca_ds.gossip.schedule import MixingSchedule
from deca_ds.gossip.skip_log import SkipLog
from deca_ds.gossip.stragglers import LateExchange
from deca_ds.transport.checksums import Exchange
from deca_ds.transport.transport import Transport, chunk_tag

_WINDOW = 4  # messages on their way at a time: bounds the receive buffers


class Gossip:
    """Mixes this rank's shards with those of the same index in neighbouring clients.

    chunk_mib: gossip.chunk_mib. device: where the shards live; those on a GPU travel by way of page-locked host memory.
    clip_radius: gossip.clip_radius; client_sum: the sum of a number over the client's ranks. window: how many
    chunks may be under way. stragglers: where late neighbours are left out; skip_log: who they were, told on stderr if
    this rank reports. wait_seconds: spent waiting for messages so far. bytes_sent: of parameters, by this rank to
    neighbours. Raises GossipError if the schedule is for another number of clients than the transport joins.
    """

    def __init__(
        self,
        transport: Transport,
        schedule: MixingSchedule,
        chunk_mib: float = 4.0,
        device: torch.device | str = "cpu",
        *,
        clip_radius: float | None = None,
        client_sum: Callable[[float], float] = float,
        stragglers: LateExchange | None = None,
        reports: bool = False,
    ):
        if schedule.size != transport.clients:
            raise GossipError(
                f"the mixing schedule is for {schedule.size} clients, but {transport.clients} are connected",
                where=f"client {transport.client}",
                fix="start as many clients as cluster.clients says",
            )
        self.transport = transport
        self.schedule = schedule
        self.wait_seconds, self.bytes_sent = 0.0, 0
        self.device = torch.device(device)
        self.pool = BufferPool(pinned=self.device.type == "cuda")
        self.clip_radius = clip_radius
        self.stragglers = stragglers
        self.skip_log = SkipLog(transport, client_sum, reports)
        self._settles = clip_radius is not None or transport.may_lose_clients or stragglers is not None
        self.window = math.inf if self._settles else _WINDOW
        self._client_sum = client_sum
        self._unsettled: list[PendingMix] = []  # of the averaging under way, all chunks so far
        self._broken: MessageError | None = None  # where clients may die: what stops it, for `settle`
        self._chunk_elements = max(1, int(chunk_mib * 2**20) // 4)  # elements of a chunk
        self.outputs = Outputs(self.device)

    def average_by(self, schedule: MixingSchedule) -> None:
        """From now on, or from the next attempt at an averaging that is done again."""
        self.schedule = schedule

    def has_neighbours(self, t: int) -> bool:
        """Whether averaging t joins this client with any other."""
        client = self.transport.client
        return bool(self.schedule.sources(client, t) or self.schedule.destinations(client, t))

    def chunks(self, numel: int) -> list[slice]:
        """A shard of `numel` elements as consecutive slices of at most chunk_mib each."""
        return [slice(a, min(a + self._chunk_elements, numel)) for a in range(0, numel, self._chunk_elements)]

    def start(self, t: int, x: Tensor, chunk: int = 0) -> PendingMix:
        """Start averaging t for `x`, flat float32 on `device`: chunk number `chunk` of the shard.

        All clients start the same chunks of the same sizes. `x` must not change before `wait` has returned. On a GPU
        the call waits until `x` is computed and copied to the host, but not for any message.
        """
        if x.dim() != 1 or x.dtype != torch.float32 or x.device.type != self.device.type or not x.is_contiguous():
            raise ValueError(
                f"expected a flat float32 tensor on {self.device}, got {x.dtype} {tuple(x.shape)} on {x.device}"
            )
        pending = PendingMix(self, t, x, chunk)
        if not self.transport.may_lose_clients:
            pending.start()
        elif self._broken is None:
            try:
                pending.start()
                self._mix_older()
            except MessageError as error:
                self._broken = error
        if self._settles:
            self._unsettled.append(pending)
        return pending

    def exchange(
        self, send: Tensor, destinations: Sequence[int], receives: Mapping[int, Tensor], tag: int, chunk: int
    ) -> Exchange:
        """Transport.exchange of chunk number `chunk`."""
        return self.transport.exchange(send, destinations, receives, tag)

    def settle(self, t: int) -> bool:
        """What comes between the last `start` and the first `wait` of averaging t; whether this client has neighbours.

        All ranks of all clients call this when they have started all chunks, also those whose shard is empty. With
        clipping, all chunks are received and given the weights that clip. Where clients may die, all is received by
        all survivors, or again without the dead; then `schedule` and with it the neighbours may have changed. Late
        neighbours that are left out count as none.
        """
        chunks, self._unsettled = self._unsettled, []
        if self.transport.may_lose_clients:  # also where nobody is left to send: more than messages is agreed on
            self.transport.together(lambda: self._receive(chunks), last=True)
        here = self.has_neighbours(t)
        if self.stragglers is not None:
            here = self._leave_out(t, chunks, self.stragglers)
        if self.clip_radius is not None:
            self._clip(t, chunks, self.clip_radius)
        return here

    def _leave_out(self, t: int, chunks: Sequence[PendingMix], stragglers: LateExchange) -> bool:
        started, neighbours = time.perf_counter(), self.schedule.sources(self.transport.client, t)
        skipped = stragglers.settle(t, neighbours) if chunks else {}  # a shard without elements has no messages
        self.wait_seconds += time.perf_counter() - started
        for pending in chunks:
            pending.leave_out(skipped)
        self.skip_log.note(neighbours, skipped)
        return len(skipped) < len(neighbours)

    def drain(self) -> None:
        """Wait until no message is under way that nobody waits for. All clients call this before they part."""
        if self.stragglers is not None:
            self.stragglers.drain()

    def _mix_older(self) -> None:
        """Make room: the means of chunks take less than what they are made of."""
        if self.clip_radius is None and len(self._unsettled) >= _WINDOW:
            place = len(self._unsettled) - _WINDOW
            self._unsettled[place].mix(place)

    def _receive(self, chunks: Sequence[PendingMix]) -> None:
        """All of an averaging, from the start if the connections are new. May be repeated."""
        broken, self._broken = self._broken, None
        if broken is not None:
            raise broken
        for pending in chunks:
            pending.start()
        for place, pending in enumerate(chunks):
            if self.clip_radius is None:
                pending.mix(place)
            else:
                pending.receive()

    def _clip(self, t: int, chunks: Sequence[PendingMix], radius: float) -> None:
        client = self.transport.client
        for pending in chunks:
            pending.receive()

        def squared(j: int) -> float:
            square = sum(squared_distance(pending.terms[j], pending.x) for pending in chunks if j in pending.terms)
            if not math.isfinite(square):
                for pending in chunks:
                    pending.refuse_not_finite()
            return square

        distances = {j: self._client_sum(squared(j)) ** 0.5 for j in self.schedule.sources(client, t)}
        for j, distance in distances.items():
            if not math.isfinite(distance):
                raise refusal(self, t, f"the block of client {j} is not at a finite distance", j)
        for pending in chunks:
            pending.weights = clipped_weights(pending.weights, client, {j: distances[j] for j in pending.terms}, radius)


class PendingMix:
    """One chunk under way. Made by Gossip.start.

    x: the own values. terms: what each source sends, by client, valid after `receive`. weights: j -> w_ij, also of this
    client.
    """

    def __init__(self, gossip: Gossip, t: int, x: Tensor, chunk: int):
        self._gossip, self._t, self.x, self._chunk = gossip, t, x, chunk
        self._exchange: Exchange | None = None  # None: not started, or nobody to talk to
        self._connections = -1  # what Transport.epoch was at the start
        self._waited = False

    def start(self) -> None:
        """Send and receive; does nothing the second time, unless the transport's connections are new since then."""
        gossip, x, transport = self._gossip, self.x, self._gossip.transport
        if self._connections == transport.epoch:
            return
        client, t = transport.client, self._t
        sources, destinations = gossip.schedule.sources(client, t), gossip.schedule.destinations(client, t)
        self._exchange, self._received = None, False
        self._mixed: Tensor | None = None
        self._buffers: dict[int, Tensor] = {}
        self._staged: Tensor | None = None
        self.terms: dict[int, Tensor] = {}
        self.weights = {j: gossip.schedule.weight(client, j, t) for j in (*sources, client)}
        stragglers = gossip.stragglers
        if stragglers is not None:
            sources = destinations = stragglers.carrying(sources)
        if sources or destinations:
            transport.progress.enter("gossip")
            if transport.may_lose_clients:  # before it is sent: a client that has diverged ends by itself
                self.refuse_not_finite()
            self._buffers = {j: gossip.pool.take(x.numel()) for j in sources}
            self.terms = {j: buffer[: x.numel()] for j, buffer in self._buffers.items()}
            tag, send = chunk_tag(t, self._chunk), x.detach()
            if x.device.type == "cuda" or stragglers is not None:  # late: the message may outlive these values of x
                staged = gossip.pool.take(x.numel())
                send = staged[: x.numel()].copy_(x)  # synchronous: the network reads host memory
            gossip.bytes_sent += send.nbytes * len(destinations)
            if stragglers is not None:
                self._exchange = stragglers.exchange(gossip.pool, staged, x.numel(), self._buffers, tag)
            else:
                self._staged = staged if x.device.type == "cuda" else None
                self._exchange = gossip.exchange(send, destinations, self.terms, tag, self._chunk)
        self._connections = transport.epoch

    def leave_out(self, skipped: Collection[int]) -> None:
        """Average without these neighbours; their buffers are no longer this chunk's."""
        for j in skipped:
            self._buffers.pop(j, None)
            self.terms.pop(j, None)
        self.weights = without(self.weights, self._gossip.transport.client, skipped)

    def wait(self) -> Tensor:
        """sum_j W_ij x_j, float32, on the device of x; call it once. With clipping, x_j as clip.py makes it.

        Terms are added in ascending client order, the own one in its place, so that the result does not depend on the
        transport. It is valid until the next `wait` of the same Gossip. With nobody to talk to it is x itself. Raises
        GossipError if a neighbour does not answer or has sent a value that is not finite, naming it; then x is
        what it was.
        """
        assert not self._waited, "a PendingMix is waited for once"
        assert self not in self._gossip._unsettled, "Gossip.settle comes before"
        self._waited = True
        return self.mix()

    def mix(self, place: int = 0) -> Tensor:
        """The mean, kept until the connections are new. place: of the buffer that it is kept in."""
        if self._exchange is None:
            return self.x
        if self._mixed is not None:
            return self._mixed
        gossip, client = self._gossip, self._gossip.transport.client
        self.receive()
        mixed = gossip.outputs.at(place, self.x.numel())
        terms = {j: term.to(mixed.device, non_blocking=True) for j, term in self.terms.items()}
        if not weighted_mean(terms | {client: self.x.detach()}, self.weights, mixed):
            self.refuse_not_finite()
        for buffer in (*self._buffers.values(), *([] if self._staged is None else [self._staged])):
            gossip.pool.give_back(buffer)
        self._mixed = mixed
        return mixed

    def receive(self) -> None:
        """Wait for the messages; does nothing the second time. Raises GossipError if one is missing or damaged."""
        if self._received or self._exchange is None:
            return
        started = time.perf_counter()
        self._exchange.wait()
        self._received = True
        self._gossip.wait_seconds += time.perf_counter() - started
        self._gossip.transport.progress.tick()

    def refuse_not_finite(self) -> None:
        """Raise GossipError, naming the client, if any of the received values or of the own ones is not finite."""
        for j, term in (*self.terms.items(), (self._gossip.transport.client, self.x.detach())):
            bad = not_finite(term)
            if bad:
                raise refusal(self._gossip, self._t, f"{bad} of {term.numel()} values of client {j} are not finite", j)


def refusal(gossip: Gossip, t: int, what: str, j: int) -> DivergedMessageError:
    """The error of a message of client j that must not be averaged."""
    return DivergedMessageError(
        f"{what} (averaging {t})",
        where=f"client {gossip.transport.client}, {gossip.transport.progress.place}",
        fix=f"the training of client {j} has diverged: lower optimizer.lr or look at its data",
    )

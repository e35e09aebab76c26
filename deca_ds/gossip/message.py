"""One chunk of an averaging under way: what is sent, what comes, and the mean of it."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from deca_ds.gossip.late import without
from deca_ds.gossip.mean import not_finite, weighted_mean
from deca_ds.transport.checksums import Exchange
from deca_ds.transport.intersections import Chunk
from deca_ds.transport.transport import chunk_tag

if TYPE_CHECKING:
    from deca_ds.gossip.strategies import Averaging


class Message:
    """Made by Averaging.send. x: the own values, which do not change before the mean is made. number: in the averaging.

    buffers: of what each source sends, by client; staged: of what this rank sends, if not `x` itself. weights: j ->
    w_ij, also of this client.
    """

    def __init__(self, averaging: Averaging, chunk: Chunk, name: str, x: Tensor, number: int):
        self.chunk, self.name, self.x = chunk, name, x.detach()
        self._averaging, self._number = averaging, number
        self._exchange: Exchange | None = None  # None: not started, or nobody to talk to
        self._connections = -1  # what Transport.epoch was at the start
        self.buffers: dict[int, Tensor] = {}

    def start(self) -> None:
        """Send and receive; does nothing the second time, unless the transport's connections are new since then."""
        averaging, gossip = self._averaging, self._averaging.gossip
        transport, client, t = gossip.transport, gossip.transport.client, self._averaging.t
        if self._connections == transport.epoch:
            return
        self._exchange, self._received = None, False
        self._mean: Tensor | None = None
        self.buffers = {}
        self.staged: Tensor | None = None
        self.weights = {j: gossip.schedule.weight(client, j, t) for j in (*gossip.schedule.sources(client, t), client)}
        sources, destinations = averaging.partners()
        if sources or destinations:
            transport.progress.enter("gossip")
            averaging.before_sending(self)
            self._send(sources, destinations)
        self._connections = transport.epoch

    def _send(self, sources: Sequence[int], destinations: Sequence[int]) -> None:
        averaging, gossip, x = self._averaging, self._averaging.gossip, self.x
        self.buffers = {j: gossip.pool.take(x.numel()) for j in sources}
        send = x
        if x.device.type == "cuda" or averaging.outlived or not gossip.codec.exact:
            self.staged = gossip.pool.take(x.numel())
            send = self.staged[: x.numel()]
            gossip.codec.encode(x, send)  # synchronous: the network reads host memory
        gossip.bytes_sent += send.nbytes * len(destinations)
        self._exchange = averaging.exchange(self, send, destinations, chunk_tag(averaging.t, self._number))

    def leave_out(self, skipped: Collection[int]) -> None:
        """Average without these neighbours; their buffers are no longer this chunk's."""
        for j in skipped:
            self.buffers.pop(j, None)
        self.weights = without(self.weights, self._averaging.gossip.transport.client, skipped)

    def receive(self) -> None:
        """Wait for the messages; does nothing the second time. Raises GossipError if one is missing or damaged."""
        if self._exchange is None or self._received:
            return
        gossip, started = self._averaging.gossip, time.perf_counter()
        self._exchange.wait()
        self._received = True
        gossip.wait_seconds += time.perf_counter() - started
        gossip.transport.progress.tick()

    def terms(self) -> dict[int, Tensor]:
        """By client, what sources have sent and what they have received from this one: float32 on the device of x."""
        gossip, numel = self._averaging.gossip, self.x.numel()
        wires = {j: buffer[:numel].to(self.x.device, non_blocking=True) for j, buffer in self.buffers.items()}
        own = gossip.codec.coded(self.x)
        return {j: gossip.codec.decode(wire) for j, wire in wires.items()} | {gossip.transport.client: own}

    def mean(self, place: int = 0) -> Tensor:
        """sum_j W_ij x_j, float32, on the device of x, by a codec as codec.py says. Kept until the connections are new.

        Terms are added in ascending client order, the own one in its place, so that the result does not depend on the
        transport. place: of the buffer that it is kept in. With nobody to talk to it is x itself. Raises GossipError
        if a neighbour does not answer or has sent a value that is not finite, naming it; then x is what it was.
        """
        if self._exchange is None:
            return self.x
        if self._mean is not None:
            return self._mean
        self.receive()
        gossip, terms = self._averaging.gossip, self.terms()
        mean = gossip.outputs.at(place, self.x.numel())
        if not weighted_mean(terms, self.weights, mean):
            self.refuse_not_finite()
        if not gossip.codec.exact:
            mean.add_(self.x - terms[gossip.transport.client])
        for buffer in (*self.buffers.values(), *([] if self.staged is None else [self.staged])):
            gossip.pool.give_back(buffer)
        self._mean = mean
        return mean

    def refuse_not_finite(self) -> None:
        """Raise GossipError, naming the client, if any of the received values or of the own ones is not finite."""
        for j, term in self.terms().items():
            bad = not_finite(term)
            if bad:
                raise self._averaging.refusal(f"{bad} of {term.numel()} values of client {j} are not finite", j)

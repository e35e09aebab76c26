"""An averaging and its messages, whatever its strategy."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deca_ds.errors import DivergedMessageError
from deca_ds.gossip.gossip import Gossip
from deca_ds.gossip.late import row_without
from deca_ds.gossip.mean import not_finite, weighted_mean
from deca_ds.transport import Chunk, Exchange, chunk_tag, exchange_chunk


class Mean(NamedTuple):
    """The mean of a tensor that `send` was given. values: 1-D float32 on that tensor's device, valid until the next
    Mean."""

    chunk: Chunk
    name: str
    values: Tensor


class Averaging(ABC):
    """Averaging t of this rank. All ranks of all clients send the same chunks in the same order, and then settle.

    mixes: whether this client may average with anybody; after `settle` whether it has. outlived: whether messages may
    outlive the averaging, so that it has to send a copy.
    """

    outlived = False

    def __init__(self, gossip: Gossip, t: int):
        self.gossip, self.t = gossip, t
        self.mixes = gossip.has_neighbours(t)
        self._sent = 0

    @abstractmethod
    def send(self, chunk: Chunk, name: str, x: Tensor) -> list[Mean]:
        """Start to send `x` and return the means, oldest first, that had to be finished to make room.

        x: 1-D float32, this rank's part of the chunk; must not change before its mean is returned. name: tells the
        caller which of several tensors a mean is of. On a GPU the call waits until `x` is computed and copied to the
        host, but not for the messages.
        """

    @abstractmethod
    def settle(self) -> Iterator[Mean]:
        """Finish the averaging after the last `send`: the remaining means, in order; none if this client has averaged
        with nobody.

        All ranks of all clients call this, also those whose shard is empty. Raises GossipError, naming the neighbour,
        if one does not answer or has sent a value that is not finite.
        """

    def partners(self) -> tuple[Sequence[int], Sequence[int]]:
        """Return the clients that messages come from, and those that they go to."""
        client, schedule = self.gossip.transport.client, self.gossip.schedule
        return schedule.sources(client, self.t), schedule.destinations(client, self.t)

    def exchange(self, message: Message, send: Tensor, destinations: Sequence[int], tag: int) -> Exchange:
        """Start to send `send` to the destinations, and to receive what the sources send into the message's buffers."""
        terms = {j: buffer[: message.chunk.numel] for j, buffer in message.buffers.items()}
        return exchange_chunk(self.gossip.transport, message.chunk, send, destinations, terms, tag)

    def before_sending(self, message: Message) -> None:  # noqa: B027, most have nothing to do
        """Prepare a message that has a receiver or a source; called right before it is sent."""

    def refusal(self, what: str, j: int) -> DivergedMessageError:
        """Make the error for a message of client j that must not be averaged."""
        transport = self.gossip.transport
        return DivergedMessageError(
            f"{what} (averaging {self.t})",
            where=f"client {transport.client}, {transport.progress.place}",
            fix=f"the training of client {j} has diverged: lower optimizer.lr or look at its data",
        )

    def _message(self, chunk: Chunk, name: str, x: Tensor) -> Message:
        device, right = self.gossip.device, (chunk.numel,)
        if x.shape != right or x.dtype != torch.float32 or x.device.type != device.type or not x.is_contiguous():
            raise ValueError(
                f"expected a flat float32 tensor {right} on {device}, got {x.dtype} {tuple(x.shape)} on {x.device}"
            )
        self._sent += 1
        return Message(self, chunk, name, x, self._sent - 1)


class Message:
    """One chunk under way: what is sent, what is received, and their mean. Made by Averaging.send.

    x: this rank's own values, which must not change before the mean is made. number: of the message in the averaging.

    weights: j -> w_ij of all sources and of this client. Once started, buffers: what each source sends, by client;
    staged: what this rank sends, if not `x` itself.
    """

    def __init__(self, averaging: Averaging, chunk: Chunk, name: str, x: Tensor, number: int):
        gossip, client, t = averaging.gossip, averaging.gossip.transport.client, averaging.t
        self.chunk, self.name, self.x = chunk, name, x.detach()
        self.weights = {j: gossip.schedule.weight(client, j, t) for j in (*gossip.schedule.sources(client, t), client)}
        self.buffers: dict[int, Tensor] = {}
        self.staged: Tensor | None = None
        self._averaging, self._number, self._connections = averaging, number, gossip.transport.epoch
        self._started, self._received = False, False
        self._exchange: Exchange | None = None  # None: not started, or without neighbours
        self._mean: Tensor | None = None

    def on_new_connections(self) -> Message:
        """Return this message or, if the connections have changed since it was made, a new one with the same values."""
        if self._connections == self._averaging.gossip.transport.epoch:
            return self
        return Message(self._averaging, self.chunk, self.name, self.x, self._number)

    def start(self) -> None:
        """Send and receive; does nothing the second time."""
        if self._started:
            return
        sources, destinations = self._averaging.partners()
        if sources or destinations:
            self._averaging.gossip.transport.progress.enter("gossip")
            self._averaging.before_sending(self)
            self._send(sources, destinations)
        self._started = True

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
        self.weights = row_without(self.weights, self._averaging.gossip.transport.client, skipped)

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
        """Return, by client, the values that the sources have sent and those that this client has sent: (x.numel(),)
        each, decoded to float32, on the device of x."""
        gossip, numel = self._averaging.gossip, self.x.numel()
        wires = {j: buffer[:numel].to(self.x.device, non_blocking=True) for j, buffer in self.buffers.items()}
        own = gossip.codec.coded(self.x)
        return {j: gossip.codec.decode(wire) for j, wire in wires.items()} | {gossip.transport.client: own}

    def mean(self, place: int = 0) -> Tensor:
        """Return sum_j W_ij x_j, 1-D float32 on the device of x; with a lossy codec as in codec.py. Computed once.

        Terms are added in ascending order of clients, this one's included, so that the result does not depend on the
        transport. place: of the output buffer that holds it. Without neighbours it is x itself. Raises GossipError,
        naming the neighbour, if one does not answer or has sent a value that is not finite; x is unchanged then.
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
        """Raise GossipError, naming the client, if any received value, or any of this client's, is not finite."""
        for j, term in self.terms().items():
            bad = not_finite(term)
            if bad:
                raise self._averaging.refusal(f"{bad} of {term.numel()} values of client {j} are not finite", j)

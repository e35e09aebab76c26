"""How an averaging goes on, from its first chunk to its last mean.

    Windowed       at most WINDOW chunks are under way, and each is averaged as it comes
    Whole          all chunks are received before the first is averaged, because the weights depend on all of them
    Committed      the same, until it counts for all survivors, or again without the dead (elastic/commit.py)
    WithoutLate    the same, without neighbours that are late (stragglers.py)

Receive buffers are used again: the window's take at most WINDOW * degree * chunk_mib, the others' degree times the
shard of the block.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from deca_ds.errors import DivergedMessageError, MessageError
from deca_ds.gossip.clip import Clip
from deca_ds.gossip.message import Message
from deca_ds.gossip.stragglers import LateExchange
from deca_ds.transport.checksums import Exchange
from deca_ds.transport.chunks import exchange_chunk
from deca_ds.transport.commit import Commit
from deca_ds.transport.intersections import Chunk

if TYPE_CHECKING:
    from deca_ds.gossip.averaging import Gossip

WINDOW = 4  # chunks under way at a time: bounds the receive buffers


class Mean(NamedTuple):
    """What `send` was given, averaged. values: float32 on the device of what was sent, valid until the next one."""

    chunk: Chunk
    name: str
    values: Tensor


class Averaging(ABC):
    """Averaging t of this rank. All ranks of all clients send the same chunks in the same order, and settle.

    mixes: whether this client averages with anybody; after `settle` whether it has. outlived: whether messages may
    outlive the averaging, so that what is sent has to be a copy.
    """

    outlived = False

    def __init__(self, gossip: Gossip, t: int):
        self.gossip, self.t = gossip, t
        self.mixes = gossip.has_neighbours(t)
        self._sent = 0

    @abstractmethod
    def send(self, chunk: Chunk, name: str, x: Tensor) -> list[Mean]:
        """Send `x`, flat float32, this rank's part of a chunk; means that had to be made to make room, oldest first.

        `x` must not change before its mean is here. name: for the caller, which of several tensors it is. On a GPU the
        call waits until `x` is computed and copied to the host, but not for its messages.
        """

    @abstractmethod
    def settle(self) -> Iterator[Mean]:
        """All has been sent: the means that are left, in order; none if this client has averaged with nobody.

        All ranks of all clients call this, also those whose shard is empty. Raises GossipError if a neighbour does not
        answer or has sent a value that is not finite, naming it.
        """

    def partners(self) -> tuple[Sequence[int], Sequence[int]]:
        """The clients that messages come from, and those that they go to."""
        client, schedule = self.gossip.transport.client, self.gossip.schedule
        return schedule.sources(client, self.t), schedule.destinations(client, self.t)

    def exchange(self, message: Message, send: Tensor, destinations: Sequence[int], tag: int) -> Exchange:
        """Start what is coming to and going from a message's buffers."""
        terms = {j: buffer[: message.chunk.numel] for j, buffer in message.buffers.items()}
        return exchange_chunk(self.gossip.transport, message.chunk, send, destinations, terms, tag)

    def before_sending(self, message: Message) -> None:  # noqa: B027, most have nothing to do
        """Called for each message, when it is about to be sent to anybody."""

    def refusal(self, what: str, j: int) -> DivergedMessageError:
        """The error of a message of client j that must not be averaged."""
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


class Windowed(Averaging):
    """Means are made while later chunks travel."""

    def __init__(self, gossip: Gossip, t: int):
        super().__init__(gossip, t)
        self._under_way: deque[Message] = deque()

    def send(self, chunk: Chunk, name: str, x: Tensor) -> list[Mean]:
        """See Averaging."""
        made = [self._oldest()] if len(self._under_way) == WINDOW else []
        self._under_way.append(self._message(chunk, name, x))
        self._under_way[-1].start()
        return made

    def settle(self) -> Iterator[Mean]:
        """See Averaging."""
        while self._under_way:
            yield self._oldest()

    def _oldest(self) -> Mean:
        message = self._under_way.popleft()
        return Mean(message.chunk, message.name, message.mean())


class Whole(Averaging):
    """Means are made when everything is here."""

    def __init__(self, gossip: Gossip, t: int, clip: Clip | None):
        super().__init__(gossip, t)
        self._clip, self._messages = clip, list[Message]()

    def send(self, chunk: Chunk, name: str, x: Tensor) -> list[Mean]:
        """See Averaging."""
        message = self._message(chunk, name, x)
        self._start(message)
        self._messages.append(message)
        return []

    def settle(self) -> Iterator[Mean]:
        """See Averaging. What all ranks agree on is agreed on when it returns, before the first mean is taken."""
        self._complete()
        if self._clip is not None:
            self._clip.reweigh(self, self._messages)
        messages = self._messages if self.mixes else []
        return (Mean(message.chunk, message.name, message.mean()) for message in messages)

    def _start(self, message: Message) -> None:
        message.start()

    def _complete(self) -> None:
        """Have everything here that the weights depend on, and know with whom this client averages."""


class Committed(Whole):
    """All is received by all survivors, or again without the dead; then the schedule and the neighbours may be new."""

    def __init__(self, gossip: Gossip, t: int, clip: Clip | None, commit: Commit):
        super().__init__(gossip, t, clip)
        self._commit = commit
        self._broken: MessageError | None = None  # what stops the sending, for the commit

    def _start(self, message: Message) -> None:
        if self._broken is None:  # else it only comes to the commit, without a sign of moving on
            try:
                message.start()
                self._make_room()
            except MessageError as error:
                self._broken = error

    def before_sending(self, message: Message) -> None:
        """See Averaging. A client that has diverged ends by itself."""
        message.refuse_not_finite()

    def _make_room(self) -> None:
        """The means of chunks take less than what they are made of."""
        place = len(self._messages) - WINDOW
        if self._clip is None and place >= 0:
            self._messages[place].mean(place)

    def _complete(self) -> None:
        # also where nobody is left to send: more than messages is agreed on
        self._commit.run(self._receive, last=True)
        self.mixes = self.gossip.has_neighbours(self.t)

    def _receive(self) -> None:
        """All of an averaging, from the start if the connections are new. May be repeated."""
        broken, self._broken = self._broken, None
        if broken is not None:
            raise broken
        for message in self._messages:
            message.start()
        for place, message in enumerate(self._messages):
            if self._clip is None:
                message.mean(place)
            else:
                message.receive()


class WithoutLate(Whole):
    """Neighbours that are late count as none, on both ends of the edge."""

    outlived = True

    def __init__(self, gossip: Gossip, t: int, clip: Clip | None, stragglers: LateExchange):
        super().__init__(gossip, t, clip)
        self._stragglers = stragglers

    def partners(self) -> tuple[Sequence[int], Sequence[int]]:
        """See Averaging. Edges that rest carry nothing."""
        carrying = self._stragglers.carrying(super().partners()[0])
        return carrying, carrying

    def exchange(self, message: Message, send: Tensor, destinations: Sequence[int], tag: int) -> Exchange:
        """See Averaging. What is sent is the edges' own from here on."""
        staged, message.staged = message.staged, None
        assert staged is not None
        return self._stragglers.exchange(self.gossip.pool, staged, message.chunk, message.buffers, tag)

    def _complete(self) -> None:
        gossip, started = self.gossip, time.perf_counter()
        neighbours = gossip.schedule.sources(gossip.transport.client, self.t)
        # a shard without elements has no messages
        skipped = self._stragglers.settle(self.t, neighbours) if self._messages else {}
        gossip.wait_seconds += time.perf_counter() - started
        for message in self._messages:
            message.leave_out(skipped)
        gossip.skip_log.note(neighbours, skipped)
        self.mixes = len(skipped) < len(neighbours)


class NotNow(Averaging):
    """At a step without an averaging."""

    def __init__(self) -> None:
        self.mixes = False

    def send(self, chunk: Chunk, name: str, x: Tensor) -> list[Mean]:
        """See Averaging."""
        raise AssertionError("there is nobody to send to")

    def settle(self) -> Iterator[Mean]:
        """See Averaging."""
        return iter(())

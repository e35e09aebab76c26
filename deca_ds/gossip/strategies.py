"""The strategies of an averaging, from its first chunk to its last mean.

    Windowed       at most WINDOW chunks are under way, and each is averaged as it arrives
    Whole          all chunks are received before the first is averaged, because the weights depend on all of them
    Committed      like Whole; if a client dies, the survivors repeat it without the dead (elastic/survivor_commit.py)
    WithoutLate    like Whole, but leaves out neighbours that are late (late_exchange.py)

Receive buffers are reused. Windowed takes at most WINDOW * degree * chunk_mib, the others degree times the block's
shard.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence

from torch import Tensor

from deca_ds.errors import MessageError
from deca_ds.gossip.averaging import Averaging, Mean, Message
from deca_ds.gossip.clip import Clip, clipped_weights, squared_distance
from deca_ds.gossip.gossip import Gossip
from deca_ds.gossip.late_exchange import LateExchange
from deca_ds.transport import Chunk, Exchange

WINDOW = 4  # chunks under way at a time: bounds the receive buffers


def begin(gossip: Gossip, t: int | None) -> Averaging:
    """Begin averaging t, without sending anything yet; one at a time. t: None at a step without an averaging."""
    if t is None:
        return NotNow()
    if gossip.commit.may_repeat:
        return Committed(gossip, t)
    if gossip.late is not None:
        return WithoutLate(gossip, t, gossip.late)
    return Windowed(gossip, t) if gossip.clip is None else Whole(gossip, t)


class Windowed(Averaging):
    """Averages each chunk while later chunks travel."""

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
    """Averages the chunks when all of them have arrived."""

    def __init__(self, gossip: Gossip, t: int):
        super().__init__(gossip, t)
        self._clip, self._messages = gossip.clip, list[Message]()

    def send(self, chunk: Chunk, name: str, x: Tensor) -> list[Mean]:
        """See Averaging."""
        message = self._message(chunk, name, x)
        self._start(message)
        self._messages.append(message)
        return []

    def settle(self) -> Iterator[Mean]:
        """See Averaging. Ranks have agreed on all that they must agree on when it returns, before the first mean."""
        self._complete()
        if self._clip is not None:
            self._reweigh(self._clip)
        messages = self._messages if self.mixes else []
        return (Mean(message.chunk, message.name, message.mean()) for message in messages)

    def _start(self, message: Message) -> None:
        message.start()

    def _reweigh(self, clip: Clip) -> None:
        """Replace the messages' weights by those that clip the neighbours; see clip.py."""
        client, sources = self.gossip.transport.client, self.gossip.schedule.sources
        squares = dict.fromkeys(sources(client, self.t), 0.0)
        for message in self._messages:
            message.receive()
            terms = message.terms()
            for j in terms.keys() - {client}:
                squares[j] += squared_distance(terms[j], terms[client])
        if not all(map(math.isfinite, squares.values())):
            for message in self._messages:
                message.refuse_not_finite()
        distances = clip.distances(squares)
        for j, distance in distances.items():
            if not math.isfinite(distance):
                raise self.refusal(f"the block of client {j} is not at a finite distance", j)
        for message in self._messages:
            near = {j: distances[j] for j in message.buffers}
            message.weights = clipped_weights(message.weights, client, near, clip.radius)

    def _complete(self) -> None:
        """Receive everything that the weights depend on, and determine with whom this client averages."""


class Committed(Whole):
    """Repeats the averaging until all survivors have received everything; without the dead, schedule and neighbours may
    change."""

    def __init__(self, gossip: Gossip, t: int):
        super().__init__(gossip, t)
        self.mixes = True  # a client without a neighbour may get one when another dies
        self._broken: MessageError | None = None  # why sending has stopped; the commit handles it

    def _start(self, message: Message) -> None:
        if self._broken is None:  # otherwise go straight to the commit, without a tick of progress
            try:
                message.start()
                self._make_room()
            except MessageError as error:
                self._broken = error

    def before_sending(self, message: Message) -> None:
        """See Averaging. A client that has diverged ends by itself."""
        message.refuse_not_finite()

    def _make_room(self) -> None:
        """Average an earlier chunk: its mean takes less memory than its receive buffers."""
        place = len(self._messages) - WINDOW
        if self._clip is None and place >= 0:
            self._messages[place].mean(place)

    def _complete(self) -> None:
        # also if no neighbour is left: the commit agrees on more than messages
        self.gossip.commit.run(self._receive, last=True)
        self.mixes = self.gossip.has_neighbours(self.t)

    def _receive(self) -> None:
        """Receive the whole averaging, from the start if the connections are new. May be repeated."""
        broken, self._broken = self._broken, None
        if broken is not None:
            raise broken
        self._messages = [message.on_new_connections() for message in self._messages]
        for message in self._messages:
            message.start()
        for place, message in enumerate(self._messages):
            if self._clip is None:
                message.mean(place)
            else:
                message.receive()


class WithoutLate(Whole):
    """Leaves out late neighbours, on both ends of the edge."""

    outlived = True

    def __init__(self, gossip: Gossip, t: int, late: LateExchange):
        super().__init__(gossip, t)
        self._late = late

    def partners(self) -> tuple[Sequence[int], Sequence[int]]:
        """See Averaging. Resting edges carry nothing."""
        carrying = self._late.carrying(super().partners()[0])
        return carrying, carrying

    def exchange(self, message: Message, send: Tensor, destinations: Sequence[int], tag: int) -> Exchange:
        """See Averaging. The buffer of what is sent belongs to the edges from here on."""
        staged, message.staged = message.staged, None
        assert staged is not None
        return self._late.exchange(self.gossip.pool, staged, message.chunk, message.buffers, tag)

    def _complete(self) -> None:
        gossip, started = self.gossip, time.perf_counter()
        neighbours = gossip.schedule.sources(gossip.transport.client, self.t)
        # an empty shard has no messages
        skipped = self._late.settle(self.t, neighbours) if self._messages else {}
        gossip.wait_seconds += time.perf_counter() - started
        for message in self._messages:
            message.leave_out(skipped)
        gossip.skip_log.note(neighbours, skipped)
        self.mixes = len(skipped) < len(neighbours)


class NotNow(Averaging):
    """The strategy of a step without an averaging."""

    def __init__(self) -> None:
        self.mixes = False

    def send(self, chunk: Chunk, name: str, x: Tensor) -> list[Mean]:
        """See Averaging."""
        raise AssertionError("there is nobody to send to")

    def settle(self) -> Iterator[Mean]:
        """See Averaging."""
        return iter(())

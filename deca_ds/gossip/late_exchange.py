"""The messages of averagings that do not wait for late neighbours; late.py has the rule.

    for every chunk: late.exchange(...)     to and from the neighbours whose edge does not rest
    skipped = late.settle(t, neighbours)    waits, gossip.wait_s at most for who is late, and decides every edge

A message of a skipped averaging still arrives, some day, and is thrown away then: its buffer and that of what was sent
stay until they are through. An edge that rests sends nothing, and its ends meet only when all that was under way
between them is through, so one averaging's messages per edge are kept at most, from both sides.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor
from torch.distributed import Store

from deca_ds.gossip.buffers import BufferPool
from deca_ds.gossip.late import HERE, MET, SKIPPED, TAKEN, EdgeDecision
from deca_ds.transport import Chunk, Exchange, Transport, exchange_chunk, poll

_Edge = Generator[None, None, EdgeDecision]


class _Lease:
    """A buffer of the pool that is given back when all messages that use it are through."""

    def __init__(self, pool: BufferPool, buffer: Tensor, messages: int):
        self._pool, self._buffer, self._messages = pool, buffer, messages

    def end(self) -> None:
        """Note that one of the messages is through."""
        self._messages -= 1
        if self._messages == 0:
            self._pool.give_back(self._buffer)


@dataclass
class _Message:
    """A message to or from one neighbour, with its exchange and the lease of its buffer."""

    exchange: Exchange
    lease: _Lease


def _through(messages: deque[_Message], then: Callable[[_Message], None]) -> bool:
    """Return whether all messages are through. Those that are leave the queue and go to `then`; they are tested one by
    one, because torch starts a thread for each test."""
    while messages and messages[0].exchange.test():
        then(messages.popleft())
    return not messages


def _release(message: _Message) -> None:
    message.lease.end()


class _Settled:
    """The Exchange of an averaging that is settled: all messages that it waits for have arrived."""

    def test(self) -> bool:
        """See Exchange."""
        return True

    def wait(self) -> None:
        """See Exchange."""


class LateExchange:
    """This rank's edges. store: the part of the job's store that all ranks of this shard index share; only the main
    thread uses it. wait_s: gossip.wait_s."""

    def __init__(self, transport: Transport, store: Store, wait_s: float):
        self.wait_s = wait_s
        self._transport, self._store = transport, store
        self._resting: set[int] = set()
        self._coming: dict[int, deque[_Message]] = defaultdict(deque)  # of the averaging under way
        self._leaving: dict[int, deque[_Message]] = defaultdict(deque)
        self._stray: dict[int, deque[_Message]] = defaultdict(deque)  # of skipped averagings, not here yet

    def carrying(self, neighbours: Sequence[int]) -> list[int]:
        """Return those of `neighbours` with which an averaging that starts now exchanges values."""
        return [j for j in neighbours if j not in self._resting]

    def exchange(
        self, pool: BufferPool, send: Tensor, chunk: Chunk, buffers: Mapping[int, Tensor], tag: int
    ) -> Exchange:
        """Start sending this rank's part of a chunk, the first elements of `send`, to all neighbours that have one of
        `buffers`, to be received into. All are of `pool`; `send` goes back there by itself, and so do the buffers of
        skipped ones. What it returns is to be waited for after `settle`."""
        lease, own = _Lease(pool, send, len(buffers)), send[: chunk.numel]
        for j, buffer in buffers.items():
            exchange = exchange_chunk(self._transport, chunk, own, [], {j: buffer[: chunk.numel]}, tag)
            self._coming[j].append(_Message(exchange, _Lease(pool, buffer, 1)))
        for j in buffers:
            self._leaving[j].append(_Message(exchange_chunk(self._transport, chunk, own, [j], {}, tag), lease))
        return _Settled()

    def settle(self, t: int, neighbours: Sequence[int]) -> dict[int, bool]:
        """Decide averaging t with each of `neighbours`; returns the skipped ones, each with whether it was late (or
        this end).

        When it returns, all values of all others are here.
        """
        self._transport.progress.enter("gossip")
        deadline = time.monotonic() + self.wait_s
        edges = {
            j: self._meet(t, j, deadline) if j in self._resting else self._take(t, j, deadline) for j in neighbours
        }
        decided: dict[int, EdgeDecision] = {}

        def go_on() -> bool:
            for j in list(edges):
                try:
                    next(edges[j])
                except StopIteration as end:
                    decided[j] = end.value
                    del edges[j]
                    self._transport.progress.tick()
            self._transport.progress.wait_for(next(iter(edges), None))
            return not edges

        poll(go_on, math.inf)  # a neighbour that has promised its values and stops is for the watcher to notice
        skipped = {}
        for j in neighbours:
            decision = decided[j]
            if not decision.says(TAKEN):
                skipped[j] = decision.mine
            if decision.says(SKIPPED):
                self._resting.add(j)
                self._stray[j].extend(self._coming.pop(j, ()))
            else:
                self._resting.discard(j)
        return skipped

    def drain(self) -> None:
        """Wait until nothing is under way any more. Every client has started all that it will send, or will do so."""
        for j in [*self._stray, *self._leaving]:
            self._transport.progress.wait_for(j)
            poll(partial(self._is_through, j), math.inf)
        self._transport.progress.wait_for(None)

    def _is_through(self, j: int) -> bool:
        """Return whether all messages from skipped averagings with j, and all to j, are through."""
        return all([_through(queue[j], _release) for queue in (self._stray, self._leaving)])

    def _take(self, t: int, j: int, deadline: float) -> _Edge:
        """Receive j's values, unless it is late."""
        decision, here = EdgeDecision(self._store, t, self._transport.client, j), list[_Message]()
        while not _through(self._coming[j], here.append):
            decision.look()
            if not decision.final and time.monotonic() > deadline:
                decision.write(SKIPPED)
            if decision.says(SKIPPED):
                break
            yield
        if not decision.final:
            decision.write(TAKEN)
        if decision.says(SKIPPED):
            for message in here:
                message.lease.end()
            return decision
        # MPI may need this rank's help to send the rest, and a gradient gives none
        while not _through(self._leaving[j], _release) and time.monotonic() < deadline:
            yield
        return decision

    def _meet(self, t: int, j: int, deadline: float) -> _Edge:
        """Find out whether j is at this averaging, too."""
        decision = EdgeDecision(self._store, t, self._transport.client, j)
        while True:
            decision.look()
            if self._is_through(j):
                if decision.blank:
                    decision.write(HERE)
                if decision.says(HERE) and not decision.mine:
                    decision.write(MET)
            if not decision.final and time.monotonic() > deadline:
                decision.write(SKIPPED)
            if decision.final:
                return decision
            yield

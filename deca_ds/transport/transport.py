"""What a transport offers, and what all transports share.

A transport joins the ranks of equal shard index, one per client. It moves bytes and knows nothing of mixing. The
collectives here are written once over `exchange`, so that their results are bit-identical over every transport.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, pairwise
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from deca_ds.errors import GossipError, MessageError
from deca_ds.launch.progress import Progress
from deca_ds.launch.view import Membership, View
from deca_ds.transport.checksums import CheckedExchange, Exchange

# Tags fit MPI's guaranteed range 0..32767. Messages of one source and tag arrive in the order in which they were sent,
# on every transport, so a tag that comes round again is harmless. Tags let an error name what was waited for.
_CHUNK_TAGS = 4096
_STEP_TAGS = 7
REDUCE_TAG, GATHER_TAG, BARRIER_TAG, PROBE_TAG, HANDOVER_TAG = (_STEP_TAGS * _CHUNK_TAGS + k for k in range(5))
REDUCE_PIECE = 2**22  # elements that all_reduce_sum works on at a time; bounds its buffers
MAX_JSON_BYTES = 2**28

Result = TypeVar("Result")


def chunk_tag(t: int, chunk: int) -> int:
    """Tag of chunk number `chunk` in averaging t."""
    return (t % _STEP_TAGS) * _CHUNK_TAGS + chunk % _CHUNK_TAGS


class Transport(Protocol):
    """One rank's end of the network between clients. Every client calls the collectives in the same order."""

    client: int  # own client number
    clients: int  # n
    may_lose_clients: bool  # whether `together` means more than to run the work
    bytes_sent: int  # payload that this rank has handed to the network so far
    progress: Progress  # what this rank is doing; waits note whom they are for
    checksums: bool  # whether messages carry checksums (checksums.py); the same for all clients

    @property
    def members(self) -> View:
        """Those that are in; the collectives join these."""
        ...

    @property
    def epoch(self) -> int:
        """How often it has been put together anew."""
        ...

    def exchange(self, send: Tensor, destinations: Sequence[int], receives: Mapping[int, Tensor], tag: int) -> Exchange:
        """Start sending `send` to each of `destinations` and receiving from each source client into its buffer.

        Contiguous CPU tensors of any dtype; a message is as long as its buffer. Neither may be touched before `wait`.
        """
        ...

    def between_ranks(
        self, send: Tensor, destinations: Sequence[int], receives: Mapping[int, Tensor], tag: int
    ) -> Exchange:
        """`exchange` with ranks, by the numbers that `partners` names."""
        ...

    def partners(self, numel: int, j: int) -> Sequence[tuple[int, slice]]:
        """Client j's ranks that hold any of this rank's slice of a parameter of `numel` elements: by their numbers for
        `between_ranks`, each with the place in the slice of what both hold. Ranks meet pairwise in one order."""
        ...

    def together(self, work: Callable[[], Result], *, last: bool = False) -> Result:
        """Run `work`, exchanges that every rank of every client runs at this place, until it counts for all of them.

        Where a client may die, all survivors agree that they are through; if not, they let go of what was received and
        of the dead clients, and run `work` again. So it may be repeated, does nothing but exchange (a collective inside
        the client would wait for a rank that has given up), and what follows from it comes after. last: nothing else is
        exchanged before the end of the inner step, where a client may then come back.
        """
        ...

    def all_reduce_sum(self, tensor: Tensor) -> None:
        """Sum over clients, in place, in the order of `members`. Contiguous CPU tensor."""
        ...

    def sum_slices(
        self, numels: Sequence[int], held: Sequence[int], values: Callable[[int, slice], Tensor]
    ) -> Iterator[tuple[int, slice, Tensor]]:
        """Sums over clients, in the order of `members`, of parameters of `numels` elements, of which this rank holds
        slices of `held`: (number of the parameter, elements of the slice, their sum), piece by piece, in order.

        values: makes the own values of a piece, a contiguous CPU tensor, which becomes the sum. A few pieces live at a
        time: while one is worked on, others travel. All must be taken.
        """
        ...

    def gather_json(self, value: Any) -> list[Any]:
        """Every client's JSON-able value, on every client, in the order of `members`."""
        ...

    def barrier(self) -> None:
        """Wait until every client is here."""
        ...

    def close(self) -> None:
        """Give the connections back. May be called twice."""
        ...


class PointToPoint(ABC):
    """The collectives of a transport, and checksums, from its `_exchange`."""

    may_lose_clients = False
    _epoch = 0

    def __init__(self, client: int, clients: int):
        self.client = client
        self.clients = clients
        self.membership = Membership(View.of_all(clients))
        self.bytes_sent = 0
        self.progress = Progress()
        self.checksums = False

    def exchange(self, send: Tensor, destinations: Sequence[int], receives: Mapping[int, Tensor], tag: int) -> Exchange:
        """See Transport."""
        if self.checksums and (destinations or receives):
            return CheckedExchange(self._exchange, self.client, send, destinations, receives, tag)
        return self._exchange(send, destinations, receives, tag)

    @property
    def members(self) -> View:
        """See Transport."""
        return self.membership.view

    @property
    def epoch(self) -> int:
        """See Transport."""
        return self._epoch

    @abstractmethod
    def _exchange(
        self, send: Tensor, destinations: Sequence[int], receives: Mapping[int, Tensor], tag: int
    ) -> Exchange:
        """Transport.exchange, without checksums."""

    def between_ranks(
        self, send: Tensor, destinations: Sequence[int], receives: Mapping[int, Tensor], tag: int
    ) -> Exchange:
        """See Transport. A client's number stands for its rank of this one's index."""
        return self.exchange(send, destinations, receives, tag)

    def partners(self, numel: int, j: int) -> Sequence[tuple[int, slice]]:
        """See Transport. Ranks of one index hold the same elements."""
        return [(j, slice(None))]

    def _place(self, peer: int) -> int:
        """Where a peer, by the number that `exchange` takes, stands in the connections."""
        return self.members.place(peer)

    def together(self, work: Callable[[], Result], *, last: bool = False) -> Result:
        """See Transport. Here a client that dies ends the job."""
        return work()

    @property
    def _others(self) -> list[int]:
        return [j for j in self.members.clients if j != self.client]

    def all_reduce_sum(self, tensor: Tensor) -> None:
        """See Transport. Each client sums a slice for all: 2 (n-1)/n of the tensor per client travel."""
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError(f"all_reduce_sum takes a contiguous CPU tensor, got one on {tensor.device}")
        for _ in in_stages((None, self._reduce(piece)) for piece in tensor.view(-1).split(REDUCE_PIECE)):
            pass

    def _reduce(self, piece: Tensor) -> Iterator[None]:
        """Sum over clients, in place; pauses twice, when messages have been started."""
        n = len(self.members)
        if n == 1 or piece.numel() == 0:
            return
        bounds = [place * piece.numel() // n for place in range(n + 1)]
        parts = [piece[a:b] for a, b in pairwise(bounds)]
        slices = dict(zip(self.members.clients, parts, strict=True))
        own = slices[self.client]
        terms = {j: torch.empty_like(own) for j in self._others}
        started = [self.exchange(slices[j], [j], {j: terms[j]}, REDUCE_TAG) for j in self._others]
        yield
        for exchange in started:
            exchange.wait()
        terms[self.client] = own.clone()
        own.zero_()
        for j in self.members.clients:
            own.add_(terms[j])
        started = [self.exchange(own, self._others, {j: slices[j] for j in self._others}, REDUCE_TAG)]
        del terms
        yield
        started[0].wait()

    def sum_slices(
        self, numels: Sequence[int], held: Sequence[int], values: Callable[[int, slice], Tensor]
    ) -> Iterator[tuple[int, slice, Tensor]]:
        """See Transport. Ranks of one index hold the same elements."""

        def pieces() -> Iterator[tuple[tuple[int, slice, Tensor], Iterator[None]]]:
            for number, count in enumerate(held):
                for start in range(0, count, REDUCE_PIECE):
                    elements = slice(start, min(start + REDUCE_PIECE, count))
                    piece = values(number, elements)
                    yield (number, elements, piece), self._reduce(piece)

        return in_stages(pieces())

    def gather_json(self, value: Any) -> list[Any]:
        """See Transport. The wire format is the length as int64, then the text as UTF-8."""
        payload = json.dumps(value).encode()
        if len(payload) > MAX_JSON_BYTES:
            raise ValueError(f"{len(payload)} bytes of JSON are more than the {MAX_JSON_BYTES} of a gathered value")
        own = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        lengths = {j: torch.empty(1, dtype=torch.int64) for j in self._others}
        self.exchange(torch.tensor([own.numel()]), self._others, lengths, GATHER_TAG).wait()
        for j, length in lengths.items():
            if not 0 < int(length) <= MAX_JSON_BYTES:
                raise GossipError(f"client {j} announced {int(length)} bytes of JSON", where=f"client {self.client}")
        texts = {j: torch.empty(int(length), dtype=torch.uint8) for j, length in lengths.items()}
        self.exchange(own, self._others, texts, GATHER_TAG).wait()
        texts[self.client] = own
        return [self._parse(j, texts[j]) for j in self.members.clients]

    def _parse(self, j: int, text: Tensor) -> Any:
        try:
            return json.loads(text.numpy().tobytes())
        except ValueError as error:
            raise GossipError(f"client {j} sent no valid JSON: {error}", where=f"client {self.client}") from None

    def barrier(self) -> None:
        """See Transport. Everybody hears from everybody."""
        heard = {j: torch.empty(1, dtype=torch.uint8) for j in self._others}
        self.exchange(torch.zeros(1, dtype=torch.uint8), self._others, heard, BARRIER_TAG).wait()

    @abstractmethod
    def close(self) -> None:
        """See Transport."""


def in_stages(works: Iterable[tuple[Result, Iterator[None]]]) -> Iterator[Result]:
    """Run works that pause at most twice, three at a time, each a stage behind the one before it; their results, in
    order. All clients start messages in the same order so."""
    under_way: deque[tuple[Result, Iterator[None]] | None] = deque()
    for work in chain(works, (None, None)):
        under_way.append(work)
        for started in reversed(under_way):
            if started is not None:
                next(started[1], None)
        oldest = under_way.popleft() if len(under_way) == 3 else None
        if oldest is not None:
            yield oldest[0]


def no_answer(client: int, neighbour: int, direction: str, tag: int, timeout_s: float, cause: str = "") -> MessageError:
    """The error of a message that did not get through. direction: "from" or "to" the neighbour."""
    return MessageError(
        f"no message {direction} client {neighbour} within {timeout_s:g} s (tag {tag}){': ' + cause if cause else ''}",
        where=f"client {client}",
        fix=f"look at the log of client {neighbour}; if it is only slow, raise cluster.timeout_s",
    )


def lost(client: int, neighbour: int, direction: str, tag: int, cause: str) -> MessageError:
    """The error of a connection that broke, or of a message that does not fit its buffer."""
    return MessageError(
        f"a message {direction} client {neighbour} failed (tag {tag}): {cause}",
        where=f"client {client}",
        fix=f"look at the log of client {neighbour}: it has stopped, or runs another configuration",
    )

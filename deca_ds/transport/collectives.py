"""Collectives over all clients, built on `Transport.exchange`: results are bit-identical over every transport.

All ranks of all clients call these in the same order. The clients of `transport.members` take part, in that order.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from deca_ds.errors import GossipError
from deca_ds.transport.checksums import Exchange
from deca_ds.transport.chunks import exchange_chunk
from deca_ds.transport.intersections import Chunk
from deca_ds.transport.transport import BARRIER_TAG, GATHER_TAG, REDUCE_TAG, Transport

REDUCE_PIECE = 2**22  # elements that a sum works on at a time; bounds its buffers
# at the most, of all that `sum_slices` holds: the piece that its caller has taken last, the three under way, and what
# the other clients have sent of two of these
PIECES_AT_A_TIME = 6
MAX_JSON_BYTES = 2**28
_DAMAGED = "have all ranks run the same deca_ds and configuration; if they do, look at that client's host and network"

Result = TypeVar("Result")


def all_reduce_sum(transport: Transport, tensor: Tensor) -> None:
    """Sum a tensor over clients, in place. tensor: contiguous, on the CPU, the same on all ranks of a client.

    Each client sums one slice for all, so each sends 2 (n-1)/n times the tensor. Raises ValueError for other tensors.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(f"all_reduce_sum takes a contiguous CPU tensor, got one on {tensor.device}")
    for _ in _in_stages((None, _reduce(transport, piece)) for piece in tensor.view(-1).split(REDUCE_PIECE)):
        pass


def sum_slices(
    transport: Transport,
    numels: Sequence[int],
    held: Sequence[int],
    values: Callable[[int, slice], Tensor],
    differ: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, slice, Tensor]]:
    """Sum parameters over clients: yields (index of the parameter, elements of this rank's slice, their sum), piece by
    piece, in order. All must be taken.

    numels: elements of each whole parameter. held: elements of this rank's slice of each. values: makes this client's
    values of a piece, a contiguous CPU tensor, which becomes the sum. differ: called whenever clients have other values
    of what this rank adds up; if no rank's is called, all clients have the same. A few pieces live at a time: while one
    is worked on, others travel. Where clients differ in size every rank sends its slice to all other clients: n-1 times
    the slice, n/2 times what it sends among clients of one size.
    """

    def pieces() -> Iterator[tuple[tuple[int, slice, Tensor], Iterator[None]]]:
        for number, (numel, count) in enumerate(zip(numels, held, strict=True)):
            if transport.layout.even:
                for start in range(0, count, REDUCE_PIECE):
                    elements = slice(start, min(start + REDUCE_PIECE, count))
                    piece = values(number, elements)
                    yield (number, elements, piece), _reduce(transport, piece, differ)
            else:
                for chunk in transport.routes.chunks([numel], max(1, REDUCE_PIECE // transport.clients)):
                    piece = values(number, chunk.part)
                    yield (number, chunk.part, piece), _sum_chunk(transport, chunk, piece, differ)

    return _in_stages(pieces())


def gather_json(transport: Transport, value: Any) -> list[Any]:
    """Return every client's JSON-able value, on every rank, in the order of the members. The wire format is the length
    as int64, then the text as UTF-8. Raises GossipError for a length that cannot be, or a text that is not JSON."""
    payload = json.dumps(value).encode()
    if len(payload) > MAX_JSON_BYTES:
        raise ValueError(f"{len(payload)} bytes of JSON are more than the {MAX_JSON_BYTES} of a gathered value")
    own = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    lengths = {j: torch.empty(1, dtype=torch.int64) for j in _others(transport)}
    _tell(transport, torch.tensor([own.numel()]), lengths, GATHER_TAG).wait()
    where = f"client {transport.client}"
    for j, length in lengths.items():
        if not 0 < int(length) <= MAX_JSON_BYTES:
            raise GossipError(f"client {j} announced {int(length)} bytes of JSON", where=where, fix=_DAMAGED)
    texts = {j: torch.empty(int(length), dtype=torch.uint8) for j, length in lengths.items()}
    _tell(transport, own, texts, GATHER_TAG).wait()
    texts[transport.client] = own
    return [_parse(j, texts[j], where) for j in transport.members.clients]


def barrier(transport: Transport) -> None:
    """Wait until every client has reached this call."""
    heard = {j: torch.empty(1, dtype=torch.uint8) for j in _others(transport)}
    _tell(transport, torch.zeros(1, dtype=torch.uint8), heard, BARRIER_TAG).wait()


def _parse(j: int, text: Tensor, where: str) -> Any:
    try:
        return json.loads(text.numpy().tobytes())
    except ValueError as error:
        raise GossipError(f"client {j} sent no valid JSON: {error}", where=where, fix=_DAMAGED) from None


def _others(transport: Transport) -> list[int]:
    return [j for j in transport.members.clients if j != transport.client]


def _tell(transport: Transport, own: Tensor, heard: dict[int, Tensor], tag: int) -> Exchange:
    """Send `own`, which all ranks of this client share, to every client in `heard`, and receive theirs into it."""
    routes = transport.routes
    hearers = [rank for j in heard for rank in routes.hearers(j)]
    return transport.exchange(own, hearers, {routes.source(j): buffer for j, buffer in heard.items()}, tag)


def _reduce(transport: Transport, piece: Tensor, differ: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Sum over clients, in place; pauses twice, when messages have been started."""
    clients, others, routes = transport.members.clients, _others(transport), transport.routes
    if len(clients) == 1 or piece.numel() == 0:
        return
    bounds = [place * piece.numel() // len(clients) for place in range(len(clients) + 1)]
    slices = dict(zip(clients, [piece[a:b] for a, b in pairwise(bounds)], strict=True))
    own = slices[transport.client]
    terms = {j: torch.empty_like(own) for j in others}
    started = [
        transport.exchange(slices[j], routes.hearers(j), {routes.source(j): terms[j]}, REDUCE_TAG) for j in others
    ]
    yield
    for exchange in started:
        exchange.wait()
    _add_up(transport, terms, own, differ)
    del terms
    started = [_tell(transport, own, {j: slices[j] for j in others}, REDUCE_TAG)]
    yield
    started[0].wait()


def _sum_chunk(transport: Transport, chunk: Chunk, piece: Tensor, differ: Callable[[], None]) -> Iterator[None]:
    """Sum over clients, in place; pauses when messages have been started."""
    others = _others(transport)
    terms = {j: torch.empty_like(piece) for j in others}
    exchange = exchange_chunk(transport, chunk, piece, others, terms, REDUCE_TAG)
    yield
    exchange.wait()
    _add_up(transport, terms, piece, differ)


def _add_up(transport: Transport, terms: dict[int, Tensor], own: Tensor, differ: Callable[[], None]) -> None:
    """Add `terms`, by client, to `own`, in the order of `members`, so that all clients get the same bits."""
    if not all(torch.equal(term, own) for term in terms.values()):
        differ()
    terms[transport.client] = own.clone()
    own.zero_()
    for j in transport.members.clients:
        own.add_(terms[j])


def _in_stages(works: Iterable[tuple[Result, Iterator[None]]]) -> Iterator[Result]:
    """Run works that pause at most twice as a pipeline of three stages; yields their results, in order.

    Each work is one stage behind the one before it, so all clients start their messages in the same order.
    """
    under_way: deque[tuple[Result, Iterator[None]] | None] = deque()
    for work in chain(works, (None, None)):
        under_way.append(work)
        for started in reversed(under_way):
            if started is not None:
                next(started[1], None)
        oldest = under_way.popleft() if len(under_way) == 3 else None
        if oldest is not None:
            yield oldest[0]

"""A client hands the state of training over to a rejoining client, between two inner steps.

The rejoining client takes over all pieces that deca_ds/engine/state.py lists, except those that belong to a single
rank. Its data, their order and its place in them follow from its own files and from these pieces.

A rank receives its part of each slice from the ranks of the giver that hold that part too: from the rank of the same
index or, where the two clients differ in size, from the ranks whose slices intersect its own. What is the same on all
ranks of a client comes from one of them. Pairs of ranks exchange in the order of the elements that they share, which is
one order for all, so that ranks never wait in a circle. A digest of all that went from one rank to another comes last.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from deca_ds.engine.slices import Slice
from deca_ds.engine.state import Piece, Scope, Sharded, TrainingState, Value, Whole
from deca_ds.errors import DisconnectedError
from deca_ds.transport import HANDOVER_TAG, Transport

_MESSAGE = 2**22  # elements; bounds the receiver's buffer


def send(transport: Transport, to: int, state: TrainingState) -> None:
    """Give this rank's part to the ranks of client `to`."""
    _StateTransfer(transport, to, sends=True).all(state)


def receive(transport: Transport, sender: int, state: TrainingState) -> None:
    """Take over this rank's part of what the ranks of client `sender` give.

    Raises DisconnectedError if what arrived is not what was sent.
    """
    _StateTransfer(transport, sender, sends=False).all(state)


class _StateTransfer:
    """This rank's end of a handover. other: the other client. sends: whether this rank sends, or receives."""

    def __init__(self, transport: Transport, other: int, sends: bool):
        self._transport, self._other, self._sends = transport, other, sends
        # digests of all slices so far, by rank of the other client, and of what is the same on all ranks
        self._slices: dict[int, hashlib.blake2b] = defaultdict(hashlib.blake2b)
        self._alike_digest = hashlib.blake2b()
        routes = transport.routes
        self._hear_alike = routes.hearers(other) if sends else [routes.source(other)]

    def all(self, state: TrainingState) -> None:
        """Transfer everything, and compare the digests."""
        for piece in state.pieces():
            self._piece(piece)
        self._end()

    def _piece(self, piece: Piece) -> None:
        if isinstance(piece, Sharded):
            for part in piece.own:
                self._slice(part)
        elif isinstance(piece, Whole):
            for _, tensor in piece.tensors:
                self._alike(tensor)
        elif piece.scope is not Scope.RANK:
            self._value(piece)
        elif not self._sends:
            piece.anew()

    def _slice(self, part: Slice) -> None:
        held = part.stored() if self._sends else torch.empty(part.stop - part.start, dtype=part.dtype)
        for rank, both_hold in self._transport.routes.shares(prod(part.shape), self._other):
            self._move([rank], held[both_hold], self._slices[rank])
        if not self._sends:
            part.fill(held)

    def _value(self, value: Value) -> None:
        text = _bytes(json.dumps(value.get()).encode() if self._sends else b"")
        length = torch.tensor([text.numel()])
        self._alike(length)
        if not self._sends:
            text = torch.empty(int(length), dtype=torch.uint8)
        self._alike(text)
        if not self._sends:
            value.set(json.loads(bytes(text.numpy())))

    def _alike(self, values: Tensor) -> None:
        """Transfer a tensor that every rank of the giver has as a whole."""
        self._move(self._hear_alike, values, self._alike_digest)

    def _move(self, ranks: Sequence[int], values: Tensor, digest: hashlib.blake2b) -> None:
        """Send `values` to all of `ranks`, or receive them from the only one."""
        exchange = self._transport.exchange
        for part in _messages(values):
            if self._sends:
                on_host = part.to("cpu", copy=True).contiguous()
                exchange(on_host, ranks, {}, HANDOVER_TAG).wait()
            else:
                on_host = torch.empty(part.shape, dtype=part.dtype)
                exchange(on_host[:0], [], {ranks[0]: on_host}, HANDOVER_TAG).wait()
                part.copy_(on_host)
            digest.update(on_host.view(torch.uint8).numpy().data)

    def _end(self) -> None:
        """Compare digests of what was sent and what arrived; the receiver raises DisconnectedError if they differ."""
        digests = [([rank], digest) for rank, digest in sorted(self._slices.items())]
        for ranks, digest in [*digests, (self._hear_alike, self._alike_digest)]:
            sent = _bytes(digest.digest())
            self._move(ranks, sent, hashlib.blake2b())
            if bytes(sent.numpy()) != digest.digest():
                raise DisconnectedError(
                    f"what arrived is not what client {self._other} handed over: the digests differ",
                    where=f"client {self._transport.client}",
                    fix="join again; if it happens twice, look at the network",
                )


def _messages(values: Tensor) -> Iterator[Tensor]:
    """Split a tensor into views, none of them empty."""
    return (part for part in values.detach().view(-1).split(_MESSAGE) if part.numel())


def _bytes(content: bytes) -> Tensor:
    return torch.tensor(list(content), dtype=torch.uint8)

"""The state of training, from one client to one that comes back, between two inner steps.

It takes over everything that its own past does not determine: the model's shards, the active block's masters and the
rule's buffers, and where the schedule stands. Its data, its order and its place in them follow from its own files and
from that.

Of each slice a rank receives what it holds, from those ranks of the giver that hold it too: from the one of its index,
or, where the two clients differ in size, from those whose slices intersect its own. What is the same on all ranks of a
client comes from one of them. Pairs of ranks meet in the order of the elements that they share, which is one order for
all, so that none waits in a circle. A digest of all that went from one rank to another comes last.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from deca_ds.algorithm.rule import GRADIENT, Rule
from deca_ds.algorithm.schedule import Schedule
from deca_ds.engine.client import BlockState, Client
from deca_ds.errors import GossipError
from deca_ds.transport.transport import HANDOVER_TAG, Transport

_PIECE = 2**22  # elements of a message; bounds the receiver's buffer


@dataclass
class Progressed:
    """Where training stands. done: inner steps. stopping: whether the job stops here. state: of the active block."""

    done: int
    stopping: bool
    state: BlockState | None


def send(transport: Transport, to: int, client: Client, standing: Progressed) -> None:
    """Give this rank's part to the ranks of client `to`."""
    way = _StateTransfer(transport, to, sends=True)
    way.alike(torch.tensor([standing.done, int(standing.stopping)]))
    way.model(client)
    way.block(client)
    way.end()


def receive(transport: Transport, sender: int, client: Client, rule: Rule, schedule: Schedule) -> Progressed:
    """Take over this rank's part of what the ranks of client `sender` give.

    Raises GossipError if what came is not what was sent.
    """
    way = _StateTransfer(transport, sender, sends=False)
    head = torch.empty(2, dtype=torch.int64)
    way.alike(head)
    done, stopping = int(head[0]), bool(head[1])
    way.model(client)
    state = None
    if done < len(schedule) and schedule.step(done).inner:
        # it may be open: when the giver is lost another one begins anew
        state = client.active or client.open_block(schedule.step(done).block, rule.buffers)
        way.block(client)
    way.end()
    return Progressed(done, stopping, state)


class _StateTransfer:
    """This rank's end of a handover. other: the other client. sends: whether it goes there, or comes from there."""

    def __init__(self, transport: Transport, other: int, sends: bool):
        self._transport, self._other, self._sends = transport, other, sends
        # of all so far, by rank; beside these, of what is alike
        self._slices: dict[int, hashlib.blake2b] = defaultdict(hashlib.blake2b)
        self._alike = hashlib.blake2b()
        routes = transport.routes
        self._hear_alike = routes.hearers(other) if sends else [routes.source(other)]

    def model(self, client: Client) -> None:
        """All parameters, what rounding took from them, and buffers."""
        names = tuple(name for block in client.plan.blocks for name in block.names) + client.plan.frozen
        for name, _, _, values in client.shards(names):
            self._slice(values, prod(client.shapes[name]))
        for name, _, bits in client.low_bits(names):
            self._slice(bits, prod(client.shapes[name]))
        for _, buffer in client.buffers():
            self.alike(buffer)

    def block(self, client: Client) -> None:
        """The active block's masters, the rule's buffers and the counts of local steps, if there is one."""
        for name, _, _, tensors in client.block_shards():
            for key in sorted(tensors.keys() - {GRADIENT}):
                self._slice(tensors[key], prod(client.shapes[name]))
        if client.active is not None:
            made = torch.tensor(client.active.local_steps.made)
            self.alike(made)
            client.active.local_steps.made = made.tolist()

    def _slice(self, values: Tensor, numel: int) -> None:
        """This rank's slice of a parameter of `numel` elements."""
        for rank, both_hold in self._transport.routes.shares(numel, self._other):
            self._move([rank], values[both_hold], self._slices[rank])

    def alike(self, values: Tensor) -> None:
        """What all ranks of the giver have whole."""
        self._move(self._hear_alike, values, self._alike)

    def _move(self, ranks: Sequence[int], values: Tensor, digest: hashlib.blake2b) -> None:
        """To all of `ranks`, or from the only one."""
        exchange = self._transport.exchange
        for piece in _pieces(values):
            if self._sends:
                on_host = piece.to("cpu", copy=True).contiguous()
                exchange(on_host, ranks, {}, HANDOVER_TAG).wait()
            else:
                on_host = torch.empty(piece.shape, dtype=piece.dtype)
                exchange(on_host[:0], [], {ranks[0]: on_host}, HANDOVER_TAG).wait()
                piece.copy_(on_host)
            digest.update(on_host.view(torch.uint8).numpy().data)

    def end(self) -> None:
        """Compare digests of what was sent and what arrived; the receiver raises GossipError if they differ."""
        digests = [([rank], digest) for rank, digest in sorted(self._slices.items())]
        for ranks, digest in [*digests, (self._hear_alike, self._alike)]:
            told = _bytes(digest.digest())
            self._move(ranks, told, hashlib.blake2b())
            if bytes(told.numpy()) != digest.digest():
                raise GossipError(
                    f"what client {self._other} handed over is not what arrived: the digests differ",
                    where=f"client {self._transport.client}",
                    fix="join again; if it happens twice, look at the network",
                )


def _pieces(values: Tensor) -> Iterator[Tensor]:
    """Views, none of them empty."""
    return (piece for piece in values.detach().view(-1).split(_PIECE) if piece.numel())


def _bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)

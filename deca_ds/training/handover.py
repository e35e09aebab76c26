"""The state of training, from one client to one that comes back, rank by rank, between two inner steps.

It takes over everything that its own past does not determine: the model's shards, the active block's masters and the
rule's buffers, and where the schedule stands. Its data, its order and its place in them follow from its own files and
from that. A digest of all that was sent comes last.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from deca_ds.algorithm.rule import Rule
from deca_ds.algorithm.schedule import Schedule
from deca_ds.engine.client import BlockState, Client
from deca_ds.errors import GossipError
from deca_ds.gossip.transport import HANDOVER_TAG, Transport
from deca_ds.training.checkpoints import GRADIENT

_PIECE = 2**22  # elements of a message; bounds the receiver's buffer


@dataclass
class Standing:
    """Where training stands. done: inner steps. stopping: whether the job stops here. state: of the active block."""

    done: int
    stopping: bool
    state: BlockState | None


def send(transport: Transport, to: int, client: Client, standing: Standing) -> None:
    """Give this rank's part to the rank of the same shard index of client `to`."""
    transport.exchange(torch.tensor([standing.done, int(standing.stopping)]), [to], {}, HANDOVER_TAG).wait()
    digest = hashlib.blake2b()
    for values in [*_model(client), *_block(standing.state)]:
        for piece in _pieces(values):
            on_host = piece.to("cpu", copy=True).contiguous()
            digest.update(memoryview(on_host.view(torch.uint8).numpy()))
            transport.exchange(on_host, [to], {}, HANDOVER_TAG).wait()
    transport.exchange(_bytes(digest.digest()), [to], {}, HANDOVER_TAG).wait()


def receive(transport: Transport, sender: int, client: Client, rule: Rule, schedule: Schedule) -> Standing:
    """Take over what the rank of the same shard index of client `sender` gives.

    Raises GossipError if what came is not what was sent.
    """
    head = torch.empty(2, dtype=torch.int64)
    transport.exchange(head[:0], [], {sender: head}, HANDOVER_TAG).wait()
    done, stopping = int(head[0]), bool(head[1])
    digest = hashlib.blake2b()

    def take(values: Tensor) -> None:
        for piece in _pieces(values):
            came = torch.empty(piece.shape, dtype=piece.dtype)
            transport.exchange(came[:0], [], {sender: came}, HANDOVER_TAG).wait()
            digest.update(memoryview(came.view(torch.uint8).numpy()))
            piece.copy_(came)

    for values in _model(client):
        take(values)
    state = None
    if done < len(schedule) and schedule.step(done).inner:
        # it may be open: when the giver is lost another one begins anew
        state = client.active or client.open_block(schedule.step(done).block, rule.buffers)
        for values in _block(state):
            take(values)
    told = torch.empty(digest.digest_size, dtype=torch.uint8)
    transport.exchange(told[:0], [], {sender: told}, HANDOVER_TAG).wait()
    if bytes(told.numpy()) != digest.digest():
        raise GossipError(
            f"what client {sender} handed over is not what arrived: the digests differ",
            where=f"client {transport.client}",
            fix="join again; if it happens twice, look at the network",
        )
    return Standing(done, stopping, state)


def _model(client: Client) -> Iterator[Tensor]:
    names = tuple(name for block in client.plan.blocks for name in block.names) + client.plan.frozen
    for *_, values in client.shards(names):
        yield values
    for _, buffer in client.buffers():
        yield buffer


def _block(state: BlockState | None) -> Iterator[Tensor]:
    if state is not None:
        for name in sorted(state.tensors.keys() - {GRADIENT}):
            yield state.tensors[name]


def _pieces(values: Tensor) -> Iterator[Tensor]:
    """Views, none of them empty."""
    return (piece for piece in values.detach().view(-1).split(_PIECE) if piece.numel())


def _bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)

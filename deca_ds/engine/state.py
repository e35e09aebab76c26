"""The training state: all that a run's next step depends on, listed once, in `TrainingState.pieces`.

Saving, restoring and the handover to a returning client iterate over the pieces. The type of a piece says how it is
distributed over the ranks of a client, which determines how it is saved, restored and handed over:

    Sharded   every rank has a slice of each tensor, as ZeRO-3 cuts it. It saves that slice, restores its slice from
              whatever slices were saved, and in a handover receives the slices that intersect its own.
    Whole     every rank has the whole tensors. Each rank saves a part, and one rank of the sender hands them over.
    Value     a JSON-able value; see Scope.

What follows from these is not listed: the order of the data and the place in it follow from the seed and the step, the
mixing matrices from the configuration and the clients in the job.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from deca_ds.algorithm import Rule, Schedule
from deca_ds.engine.client import Client
from deca_ds.engine.slices import Slice, buffer_name

FROZEN, BUFFERS = "frozen", "buffers"


class Scope(Enum):
    """Whose a value is."""

    CLIENT = "the same on all ranks of a client: saved, restored and handed over"
    RANK = "a rank's own: saved, and restored if the client has as many ranks; otherwise, and in a handover, set anew"
    ATTEMPT = "of this attempt at the run: handed over, and not saved"


@dataclass(frozen=True)
class Sharded:
    """Tensors of which every rank has a slice. label: names the group, and its file in a checkpoint."""

    label: str
    own: Iterable[Slice]

    def slices(self, rank: int, ranks: int) -> Iterable[Slice]:
        """Return what this rank saves, and restores by `Slice.fill`."""
        return self.own


@dataclass(frozen=True)
class Whole:
    """Tensors (name, values) that every rank has. label: as in Sharded."""

    label: str
    tensors: Iterable[tuple[str, Tensor]]

    def slices(self, rank: int, ranks: int) -> Iterator[Slice]:
        """Yield what `rank` of the client's `ranks` saves; all ranks together must fill these."""
        for name, tensor in self.tensors:
            size = -(-tensor.numel() // ranks)
            start, stop = (min(tensor.numel(), place * size) for place in (rank, rank + 1))
            flat = tensor.reshape(-1)
            yield Slice(
                name, tuple(tensor.shape), start, stop, flat[start:stop], write=partial(_join, tensor, start, stop)
            )


@dataclass(frozen=True)
class Value:
    """A JSON-able value. name: its key in a checkpoint's manifest. anew: for Scope.RANK, sets it if none was saved."""

    name: str
    get: Callable[[], Any]
    set: Callable[[Any], None]
    scope: Scope = Scope.CLIENT
    anew: Callable[[], None] = lambda: None


Piece = Sharded | Whole | Value


class Traffic(Protocol):
    """Counts what gossip has sent, in bytes, and how long it has waited."""

    bytes_sent: int
    wait_seconds: float


@dataclass
class TrainingState:
    """The training state of one rank. done: inner steps so far. stopping: whether the job stops here. seed: of this
    rank. best: see training/best.py; JSON-able."""

    client: Client
    rule: Rule
    schedule: Schedule
    traffic: Traffic
    done: int = 0
    stopping: bool = False
    seed: int = field(default_factory=torch.initial_seed)
    best: dict[str, Any] = field(default_factory=dict)

    def pieces(self) -> Iterator[Piece]:
        """Yield all pieces, in the order in which they must be set: the step comes first, because it opens the block
        that others need."""
        client = self.client
        yield Value("schedule", lambda: position(self.schedule, self.done), self._stand_at)
        yield Value("stopping", lambda: self.stopping, partial(setattr, self, "stopping"), Scope.ATTEMPT)
        yield Value("best", lambda: dict(self.best), partial(setattr, self, "best"))
        yield from model_pieces(client)
        for key in sorted(self.rule.buffers) if client.active is not None else ():
            yield Sharded(key, _block_slices(client, key))
        yield Value("local_steps", self._local_steps, self._set_local_steps)
        yield Value("random", lambda: _random_state(client.device), self._set_random, Scope.RANK, self._draw_anew)
        yield Value("gossip", lambda: {key: getattr(self.traffic, key) for key in _TRAFFIC}, self._count, Scope.RANK)

    def _stand_at(self, at: dict[str, int]) -> None:
        self.done = at["done"]
        if at.get("inner") and self.client.active is None:  # it may be open: another client hands its state over again
            self.client.open_block(at["block"], self.rule.buffers)

    def _local_steps(self) -> list[int] | None:
        return None if self.client.active is None else list(self.client.active.local_steps.made)

    def _set_local_steps(self, made: list[int] | None) -> None:
        if self.client.active is not None and made is not None:
            self.client.active.local_steps.made = list(made)

    def _set_random(self, states: dict[str, str]) -> None:
        set_random_state(states, self.client.device)

    def _draw_anew(self) -> None:
        torch.manual_seed(self.seed + (self.done << 32))

    def _count(self, counted: dict[str, Any]) -> None:
        for key in _TRAFFIC:
            setattr(self.traffic, key, counted[key])


_TRAFFIC = ("bytes_sent", "wait_seconds")


def model_pieces(client: Client) -> Iterator[Sharded | Whole]:
    """Yield the trained model: one group of parameters per block, then the frozen parameters, then the buffers.

    Parameters that have masters are represented by their masters.
    """
    for block in client.plan.blocks:
        yield Sharded(block.label, _parameters(client, block.names))
    yield Sharded(FROZEN, _parameters(client, client.plan.frozen))
    yield Whole(BUFFERS, client.buffers())  # a forward pass may change them, so they are apart from frozen parameters


def _parameters(client: Client, names: tuple[str, ...]) -> Iterator[Slice]:
    for name, start, stop, values, low in client.masters(names):
        write = partial(client.set_master, name)
        yield Slice(name, client.shapes[name], start, stop, values, low, write, client.dtypes[name])


def _block_slices(client: Client, key: str) -> Iterator[Slice]:
    """Yield this rank's slices of one of the rule's buffers."""
    for name, start, stop, tensors in client.block_shards():
        yield Slice(buffer_name(key, name), client.shapes[name], start, stop, tensors[key])


def _join(tensor: Tensor, start: int, stop: int, part: Tensor) -> None:
    """Overwrite `tensor` on all ranks of the client. Each contributes a part, this one elements [start, stop)."""
    flat = torch.zeros_like(tensor).reshape(-1)
    flat[start:stop] = part
    dist.all_reduce(flat.view(torch.uint8))  # everybody else's bytes are zero
    tensor.copy_(flat.view_as(tensor))


def position(schedule: Schedule, done: int) -> dict[str, int]:
    """Return where a run stands after `done` inner steps: the place of the next step in the schedule."""
    if done == len(schedule):
        return {"done": done, "of": len(schedule)}
    step = schedule.step(done)
    return {"done": done, "of": len(schedule), "round": step.round, "block": step.block, "inner": step.inner}


def _random_state(device: torch.device) -> dict[str, str]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {kind: base64.b64encode(state.numpy().tobytes()).decode() for kind, state in states.items()}


def set_random_state(saved: dict[str, str], device: torch.device) -> None:
    """Undo what was drawn since `_random_state`, on a device of the same kind."""
    for kind, text in saved.items():
        state = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        if kind == "cpu":
            torch.set_rng_state(state)
        elif kind == device.type:
            torch.cuda.set_rng_state(state, device)

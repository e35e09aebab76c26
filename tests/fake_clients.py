"""Ranks of bfloat16 clients in threads of this process: what `engine.state` asks of a client, without ZeRO-3."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from math import prod
from types import SimpleNamespace

import torch

from deca_ds.algorithm.local import LocalSteps
from deca_ds.algorithm.schedule import Schedule
from deca_ds.engine.masters import low_bits, rounded
from deca_ds.engine.state import TrainingState
from deca_ds.transport.intersections import held

# no number of ranks divides them, and some ranks hold nothing of some
SHAPES = {"a": (7, 3), "b": (2,), "c": (1,), "frozen": (13,)}
BLOCK, SCHEDULE = ("a", "c"), Schedule(rounds=2, blocks=2, inner_steps=5)
RULE = SimpleNamespace(buffers=("v", "m"))


class FakeClient:
    """One rank's slices of a client whose values are all different. number: whose values they are."""

    def __init__(self, ranks: int, shard: int, number: int):
        self._ranks, self._shard, self._number = ranks, shard, number
        self.device, self.shapes, self.active = torch.device("cpu"), SHAPES, None
        self.dtypes = dict.fromkeys(SHAPES, torch.bfloat16)
        blocks = [SimpleNamespace(label=f"block {'+'.join(n)}", names=n) for n in (BLOCK, ("b",))]
        self.plan = SimpleNamespace(blocks=blocks, frozen=("frozen",))
        self._masters = {name: self._slice(name, 100 * place) for place, name in enumerate(SHAPES)}
        self._buffers = {
            "table": torch.arange(6.0).view(2, 3) + number,
            "count": torch.tensor(number),
            "flag": torch.tensor([number % 2 == 0, number % 2 == 1, number % 2 == 0]),
        }

    def _slice(self, name: str, offset: int) -> torch.Tensor:
        numel = prod(SHAPES[name])
        whole = (torch.arange(float(numel)) + offset) / 3 + 1000 * self._number  # no bfloat16 holds it
        return torch.cat([whole[:0], *(whole[a:b] for a, b in held([numel], self._ranks, self._shard))]).clone()

    @property
    def exact(self) -> dict[str, torch.Tensor]:
        """This rank's float32 masters, while no block is open."""
        return self._masters

    def range_of(self, name: str) -> tuple[int, int]:
        numel = prod(SHAPES[name])
        size = -(-numel // self._ranks)
        return min(numel, self._shard * size), min(numel, (self._shard + 1) * size)

    def train(self) -> None:
        """Have a block open, of which every tensor has values of its own."""
        self.open_block(0, RULE.buffers)
        for place, key in enumerate(self.active.tensors):
            for name in BLOCK:
                self.active.tensors[key][name].copy_(self._slice(name, 10000 * (1 + place)))
        self.active.local_steps.made = [3, self._number]

    def open_block(self, index: int, buffers: tuple[str, ...]) -> SimpleNamespace:
        assert self.active is None and index == 0
        tensors = {key: {n: torch.zeros_like(self._masters[n]) for n in BLOCK} for key in ("theta", "grad", *buffers)}
        steps = LocalSteps([self._masters[name].numel() for name in BLOCK], [True, False])
        self.active = SimpleNamespace(tensors=tensors, local_steps=steps)
        return self.active

    def masters(self, names):
        for name in names:
            if self.active is not None and name in BLOCK:
                yield name, *self.range_of(name), self.active.tensors["theta"][name], None
            else:
                low = None if name == "frozen" else low_bits(self._masters[name]).clone()
                yield name, *self.range_of(name), rounded(self._masters[name]), low

    def set_master(self, name, values):
        self._masters[name].copy_(values)
        if self.active is not None and name in BLOCK:
            self.active.tensors["theta"][name].copy_(values)

    def block_shards(self):
        for name in BLOCK if self.active is not None else ():
            yield name, *self.range_of(name), {key: values[name] for key, values in self.active.tensors.items()}

    def buffers(self):
        return iter(self._buffers.items())


def training_state(ranks: int, shard: int, number: int, done: int = 0, kind=TrainingState) -> TrainingState:
    """Of a rank, after `done` inner steps. number: see FakeClient."""
    client, traffic = FakeClient(ranks, shard, number), SimpleNamespace(bytes_sent=7 * number, wait_seconds=number / 8)
    state = kind(client, RULE, SCHEDULE, traffic, done, seed=number)
    state.best = {"step": number, "loss": number / 4, "since": 0}
    if done < len(SCHEDULE) and SCHEDULE.step(done).inner:
        client.train()
    return state


def tensors_of(state: TrainingState) -> dict[str, torch.Tensor]:
    """Copies of all tensors that are listed, by name: of slices what is stored."""
    pieces = [piece for piece in state.pieces() if hasattr(piece, "slices")]
    found = {part.name: part.stored().clone() for piece in pieces for part in getattr(piece, "own", ())}
    return found | {name: tensor.clone() for piece in pieces for name, tensor in getattr(piece, "tensors", ())}


def in_threads(ranks, body):
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(body, ranks))

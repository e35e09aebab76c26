"""What a run's next step depends on is listed once: whatever stands in the list is saved, restored and handed over."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from math import prod
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_clients import RULE, SCHEDULE, FakeClient, in_threads, tensors_of, training_state
from torch.distributed import HashStore

from deca_ds.checkpoint.open_steps import open_checkpoint
from deca_ds.checkpoint.part import Part
from deca_ds.config.schema import CheckpointConfig
from deca_ds.elastic.handover import receive, send
from deca_ds.engine import state as listing
from deca_ds.engine.slices import Slice
from deca_ds.engine.state import Scope, Sharded, TrainingState, Value, Whole
from deca_ds.errors import CheckpointError
from deca_ds.launch.launcher import ClientLayout
from deca_ds.launch.progress import Progress
from deca_ds.launch.store import JobStore
from deca_ds.launch.view import View
from deca_ds.training.checkpoints import Checkpoints, slice_groups
from deca_ds.training.completion import CompletionByStore
from deca_ds.training.restore import restore
from deca_ds.training.resume import Resumption
from deca_ds.transport.local import LocalNetwork

INSIDE, BETWEEN = 3, 5  # inner steps done: in the middle of an activation, and between two
WHOSE, NEW = (
    4,
    1,
)  # the numbers that the values of the saved state are made from, and those of the one that takes it over


@dataclass
class WithMore(TrainingState):
    """With pieces that nothing knows but the list."""

    extra: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        name, (start, stop) = "a", self.client.range_of("a")
        self.extra |= {"sharded": torch.arange(start, stop) + self.seed, "whole": torch.full((2, 2), float(self.seed))}
        self.extra |= {scope.name: [self.seed, scope.name] for scope in Scope}
        self.shape = self.client.shapes[name]

    def pieces(self):
        yield from super().pieces()
        start, stop = self.client.range_of("a")
        yield Sharded("more", [Slice("more/a", self.shape, start, stop, self.extra["sharded"])])
        yield Whole("other", [("other/table", self.extra["whole"])])
        for scope in Scope:
            name = scope.name
            yield Value(name, lambda name=name: self.extra[name], lambda to, name=name: self.extra.update({name: to}),
                        scope, lambda name=name: self.extra.update({name: "anew"}))  # fmt: skip


def values_of(state: TrainingState, *scopes: Scope) -> dict[str, object]:
    return {piece.name: piece.get() for piece in state.pieces() if isinstance(piece, Value) and piece.scope in scopes}


def make(ranks: int, shard: int, number: int, done: int) -> TrainingState:
    return training_state(ranks, shard, number, done, WithMore)


def cluster(ranks: int, shard: int) -> SimpleNamespace:
    return SimpleNamespace(
        client=0, clients=1, shard=shard, ranks=ranks, is_job_leader=True, members=View.of_all(1), progress=Progress(),
        launch=SimpleNamespace(world_size=ranks), store=JobStore(HashStore(), None, timedelta(seconds=100)),
    )  # fmt: skip


def save(state: TrainingState, ranks: int, shard: int, folder: Path) -> None:
    gossip = SimpleNamespace(schedule=SimpleNamespace(matrices=(np.eye(1),)))
    here = cluster(ranks, shard)
    options = {"folder": folder, "attempt": 1, "timeout_s": 100.0}
    saver = Checkpoints(CheckpointConfig(), here, state, gossip, CompletionByStore(here, 1, 100.0), **options)
    saver.save()
    saver.wait()


def load(state: TrainingState, done: int, ranks: int, shard: int, folder: Path) -> None:
    saved = open_checkpoint(folder, done, Part(0, shard, ranks))
    same = saved.ranks[0] == ranks
    restore(Resumption(done, saved, saved.states[0, shard if same else 0], same), cluster(ranks, shard), state)


def summing(ranks: int) -> Callable[[torch.Tensor], None]:
    """An all_reduce of `ranks` threads."""
    barrier, parts = threading.Barrier(ranks, timeout=100), []

    def all_reduce(tensor: torch.Tensor) -> None:
        parts.append(tensor.clone())
        barrier.wait()
        total = torch.stack(parts).sum(dim=0).to(tensor.dtype)
        barrier.wait()
        tensor.copy_(total)
        parts.clear()
        barrier.wait()

    return all_reduce


def assert_equal_tensors(state: TrainingState, expected: TrainingState) -> None:
    got, wanted = tensors_of(state), tensors_of(expected)
    assert got.keys() == wanted.keys() and {"more/a", "other/table"} < got.keys()
    for name, tensor in got.items():
        assert tensor.dtype == wanted[name].dtype and torch.equal(tensor, wanted[name]), name


def test_the_states_of_these_tests_differ_in_every_piece() -> None:
    torch.manual_seed(1)
    one, other = make(1, 0, WHOSE, INSIDE), make(1, 0, NEW, BETWEEN)
    one.stopping = True
    others = tensors_of(other)
    assert tensors_of(one).keys() - others.keys() == {"m/a", "m/c", "v/a", "v/c"}  # no block is open there
    for name, tensor in tensors_of(one).items():
        assert name not in others or not torch.equal(tensor, others[name]) or prod(tensor.shape) == 0, name
    ours = values_of(one, *Scope)
    torch.rand(1)
    for name, value in values_of(other, *Scope).items():
        assert value != ours[name], name
    assert ours.keys() >= {"schedule", "stopping", "local_steps", "random", "gossip"}


def test_what_is_listed_of_a_parameter_are_its_exact_masters() -> None:
    """The other tests compare what is stored before and after."""
    client = FakeClient(1, 0, WHOSE)
    state = TrainingState(client, RULE, SCHEDULE, SimpleNamespace(bytes_sent=0, wait_seconds=0.0))
    stored = tensors_of(state)
    for name in ("a", "b", "c"):
        masters = client.exact[name]
        assert not torch.equal(masters.bfloat16().float(), masters), "there is nothing to lose"
        assert torch.equal(stored[name], masters), name
        copies = [part.copy() for piece in state.pieces() if isinstance(piece, Sharded) for part in piece.own]
        assert torch.equal(next(part for part in copies if part.name == name).stored(), masters), name


def test_every_group_that_is_saved_is_a_sign_of_life() -> None:
    state, moved = training_state(1, 0, WHOSE, INSIDE), []
    here = cluster(1, 0)
    here.progress.tick = lambda: moved.append(None)
    for count, (_, slices) in enumerate(slice_groups(state.pieces(), here), start=1):
        assert len(moved) == count and list(slices)
    assert count == len([piece for piece in state.pieces() if not isinstance(piece, Value)]) > 4


@pytest.mark.parametrize("done", [INSIDE, BETWEEN, len(SCHEDULE)])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (2, 3), (3, 1)])
def test_all_pieces_are_saved_and_restored(before, after, done, tmp_path, monkeypatch) -> None:
    """before, after: numbers of ranks."""
    monkeypatch.setattr(listing.dist, "all_reduce", summing(after))
    for shard in range(before):
        torch.manual_seed(shard)
        save(make(before, shard, WHOSE, done), before, shard, tmp_path)
    saved_random = torch.get_rng_state()

    def body(shard: int) -> TrainingState:
        state = make(after, shard, NEW, 0)
        load(state, done, after, shard, tmp_path)
        return state

    torch.manual_seed(99)
    for shard, state in enumerate(in_threads(range(after), body)):
        expected = make(after, shard, WHOSE, done)
        assert_equal_tensors(state, expected)
        assert values_of(state, Scope.CLIENT) == values_of(expected, Scope.CLIENT)
        own, of_the_attempt = values_of(state, Scope.RANK), values_of(state, Scope.ATTEMPT)
        assert of_the_attempt == {"stopping": False, "ATTEMPT": [NEW, "ATTEMPT"]}
        if before == after:
            assert own["RANK"] == [WHOSE, "RANK"] and own["gossip"] == {"bytes_sent": 28, "wait_seconds": 0.5}
        else:
            assert own["RANK"] == "anew" and own["gossip"] == {"bytes_sent": 7, "wait_seconds": 0.125}
    if before == after == 1:
        assert torch.equal(torch.get_rng_state(), saved_random)
    elif before != after:
        assert torch.initial_seed() == NEW + (done << 32)


@pytest.mark.parametrize("done", [INSIDE, BETWEEN])
@pytest.mark.parametrize("sizes", [(1, 1), (2, 2), (2, 3)])
def test_all_pieces_are_handed_over_but_what_is_a_ranks_own(sizes, done) -> None:
    layout = ClientLayout.of(sizes)
    network = LocalNetwork(sizes, 100.0)

    def body(number: int) -> TrainingState:
        gives, way = layout.client_of(number) == 0, network.transport(number)
        ranks, shard = sizes[layout.client_of(number)], layout.shard_of(number)
        state = make(ranks, shard, WHOSE if gives else NEW, done if gives else 0)
        state.stopping = gives
        send(way, 1, state) if gives else receive(way, 0, state)
        return state

    for shard, state in enumerate(in_threads(range(sum(sizes)), body)[sizes[0] :]):
        expected = make(sizes[1], shard, WHOSE, done)
        expected.stopping = True
        assert_equal_tensors(state, expected)
        shared = (Scope.CLIENT, Scope.ATTEMPT)
        assert values_of(state, *shared) == values_of(expected, *shared)
        own = values_of(state, Scope.RANK)
        assert own["RANK"] == "anew" and own["gossip"] == {"bytes_sent": 7, "wait_seconds": 0.125}
        assert state.done == done and (state.client.active is not None) == (done == INSIDE)
    assert torch.initial_seed() == NEW + (done << 32)


def test_a_checkpoint_that_lacks_a_piece_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(listing.dist, "all_reduce", summing(1))
    save(training_state(1, 0, WHOSE, INSIDE), 1, 0, tmp_path)
    with pytest.raises(CheckpointError, match=r"more/a has shape .* it is missing"):
        load(make(1, 0, NEW, 0), INSIDE, 1, 0, tmp_path)
    monkeypatch.setattr(WithMore, "pieces", lambda self: [*TrainingState.pieces(self), Value("more", int, int)])
    with pytest.raises(CheckpointError, match="the value 'more' is missing"):
        load(make(1, 0, NEW, 0), INSIDE, 1, 0, tmp_path)

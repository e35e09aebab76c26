"""Saving in the background: one copy at a time, the newest K kept, failures told at the next step's end."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from jobs import wait_until
from torch.distributed import HashStore

from deca_ds.algorithm.local import LocalSteps
from deca_ds.algorithm.schedule import Schedule
from deca_ds.checkpoint.open_steps import open_checkpoint
from deca_ds.checkpoint.part import Part
from deca_ds.checkpoint.steps import step_folder, steps_in
from deca_ds.config.schema import CheckpointConfig
from deca_ds.engine.state import TrainingState, set_random_state
from deca_ds.errors import CheckpointError
from deca_ds.launch.progress import Progress
from deca_ds.launch.store import JobStore
from deca_ds.launch.view import View
from deca_ds.training import checkpoints as module
from deca_ds.training.checkpoints import Checkpoints
from deca_ds.training.completion import CompletionByStore

SHAPES = {"a": (3, 2), "b": (4,), "d": (3,)}
LOW = {"d": torch.tensor([-1, 0, 3], dtype=torch.int16)}


class OneRank:
    """A client of one rank whose block `a` is active, with all of its state equal to `value`; of `d` it has masters."""

    def __init__(self) -> None:
        self.device, self.shapes, self.value = torch.device("cpu"), SHAPES, 0.0
        self.dtypes = dict.fromkeys(SHAPES, torch.bfloat16)
        block = SimpleNamespace(label="block", names=("a",))
        other = SimpleNamespace(label="other", names=("d",))
        self.plan = SimpleNamespace(blocks=[block, other], frozen=("b",))
        self.active = SimpleNamespace(local_steps=LocalSteps([6], [True]))
        self.active.local_steps.next([True])

    def masters(self, names):
        for name in names:
            numel = int(np.prod(SHAPES[name]))
            if name == "a":
                yield name, 0, numel, torch.full((numel,), self.value), None
            else:
                yield name, 0, numel, torch.ones(numel, dtype=torch.bfloat16), LOW.get(name)

    def set_master(self, name, values):
        raise AssertionError("saving changes nothing")

    def block_shards(self):
        yield "a", 0, 6, {key: torch.full((6,), self.value) for key in ("theta", "grad", "m", "v")}

    def buffers(self):
        return iter([("c", torch.arange(5))])


@dataclass
class Job:
    """One rank's view of a job."""

    saver: Checkpoints
    client: OneRank
    store: HashStore
    state: TrainingState

    def after_step(self, done: int) -> None:
        self.state.done = done
        self.saver.after_step()


@pytest.fixture
def job(tmp_path: Path):
    """make(world=1, **CheckpointConfig) -> Job. others_s: for all ranks to write."""
    mixing = SimpleNamespace(matrices=(np.eye(1),))
    gossip = SimpleNamespace(schedule=mixing, bytes_sent=3, wait_seconds=0.5)

    def make(world: int = 1, resumed: int | None = None, others_s: float = 100.0, **config: int):
        store = HashStore()
        cluster = SimpleNamespace(
            client=0, clients=1, shard=0, ranks=1, is_job_leader=True, members=View.of_all(1),
            launch=SimpleNamespace(world_size=world), progress=Progress(),
            store=JobStore(store, None, timedelta(seconds=100)),
        )  # fmt: skip
        client = OneRank()
        options = {"folder": tmp_path / "checkpoints", "attempt": 7, "timeout_s": 100.0, "resumed": resumed}
        schedule = Schedule(rounds=2, blocks=2, inner_steps=5)
        completion = CompletionByStore(cluster, 7, others_s)
        state = TrainingState(client, SimpleNamespace(buffers=("m", "v")), schedule, gossip)
        saver = Checkpoints(CheckpointConfig(**config), cluster, state, gossip, completion, **options)
        return Job(saver, client, store, state)

    return make


def test_a_checkpoint_holds_masters_buffers_and_the_place_in_the_run(job, tmp_path: Path) -> None:
    run = job(every=3)
    run.client.value = 1 / 3
    for done in (1, 2, 3):
        run.after_step(done)
    run.saver.wait()
    assert steps_in(tmp_path / "checkpoints") == [3]
    saved = open_checkpoint(tmp_path / "checkpoints", 3, Part(0, 0, 1))
    assert set(saved.names) == {"a", "b", "c", "d", "m/a", "v/a"}
    assert saved.states[0, 0]["local_steps"] == [1]
    assert saved.dtype("a") == saved.dtype("d") == torch.float32 and saved.dtype("b") == torch.bfloat16
    assert {saved.model_dtype(name) for name in SHAPES} == {torch.bfloat16}  # also of the active block
    assert torch.equal(saved.read("d", 0), torch.tensor([1 - 2**-24, 1, 1 + 3 * 2**-23]))
    assert torch.equal(saved.read("v/a", 0), torch.full((3, 2), 1 / 3))
    assert torch.equal(saved.read("c", 0), torch.arange(5))
    state = saved.states[0, 0]
    assert state["schedule"] == {"done": 3, "of": 20, "round": 0, "block": 0, "inner": 3}
    torch.manual_seed(99)
    set_random_state(state["random"], torch.device("cpu"))
    drawn = torch.rand(3)
    set_random_state(state["random"], torch.device("cpu"))
    assert torch.equal(torch.rand(3), drawn)


def test_the_newest_complete_ones_are_kept(job, tmp_path: Path) -> None:
    run = job(world=2, others_s=0.2, every=1, keep=2)
    for done in range(1, 5):
        run.after_step(done)
        run.saver.wait()
    assert steps_in(tmp_path / "checkpoints") == [1, 2, 3, 4]  # the other rank has written none
    for done in range(1, 4):
        run.store.add(f"checkpoint/7/{done}", 1)
    run.after_step(5)
    run.saver.wait()
    assert steps_in(tmp_path / "checkpoints") == [2, 3, 4, 5]
    # what was complete when each was written, for a run that finds none whole
    whole = [open_checkpoint(tmp_path / "checkpoints", step, Part(0, 0, 1)) for step in (4, 5)]
    assert [saved.states[0, 0]["earlier"] for saved in whole] == [None, 3]
    with pytest.raises(CheckpointError, match="not all ranks have saved step 5"):
        run.saver.wait_for_all()
    for done in (4, 5):
        run.store.add(f"checkpoint/7/{done}", 1)
    run.saver.wait_for_all()
    assert steps_in(tmp_path / "checkpoints") == [4, 5]  # what was kept for the other rank has gone


def test_training_continues_while_one_is_written_and_the_next_waits(job, tmp_path: Path, monkeypatch) -> None:
    run = job(every=1)
    writing, go = threading.Event(), threading.Event()
    original = module.save_shards

    def slow(*arguments, **options):
        writing.set()
        assert go.wait(timeout=100)
        return original(*arguments, **options)

    monkeypatch.setattr(module, "save_shards", slow)
    run.client.value = 1.0
    run.after_step(1)
    assert writing.wait(timeout=100)
    run.client.value = 2.0  # training continues: what is written is a copy
    next_one = threading.Thread(target=run.after_step, args=(2,))
    next_one.start()
    next_one.join(timeout=0.2)
    assert next_one.is_alive()
    go.set()
    next_one.join(timeout=100)
    run.saver.wait()
    for step in (1, 2):
        saved = open_checkpoint(tmp_path / "checkpoints", step, Part(0, 0, 1))
        assert torch.equal(saved.read("m/a", 0), torch.full((3, 2), float(step)))


def test_a_full_disk_ends_the_run_and_leaves_what_was_saved(job, tmp_path: Path, monkeypatch) -> None:
    run = job(every=2)
    run.after_step(2)
    run.saver.wait()
    from deca_ds.checkpoint import write_shards

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write_shards, "save_file", full)
    run.after_step(4)
    message = r"No space left[\s\S]*takes 0.0 MB, [\d.]+ MB are free[\s\S]*step_00000004[\s\S]*run.resume=require"
    with pytest.raises(CheckpointError, match=message):
        wait_until(lambda: run.after_step(5), "told of the full disk")
    open_checkpoint(tmp_path / "checkpoints", 2, Part(0, 0, 1))
    assert not list(step_folder(tmp_path / "checkpoints", 4).rglob("*rank*"))


def test_the_checkpoint_that_a_run_continued_from_is_not_written_again(job, tmp_path: Path) -> None:
    run = job(resumed=6)
    run.state.done = 6
    run.saver.save()
    run.saver.wait_for_all()
    assert steps_in(tmp_path / "checkpoints") == []

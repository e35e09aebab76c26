"""What a checkpoint takes over from an earlier one instead of writing it again, and the disk that a run needs."""

from __future__ import annotations

import errno
import os
import shutil
from datetime import timedelta
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributed import HashStore

from deca_ds.algorithm.local import LocalSteps
from deca_ds.algorithm.schedule import Schedule
from deca_ds.checkpoint import write_shards
from deca_ds.checkpoint.open_steps import open_checkpoint
from deca_ds.checkpoint.part import Part, rank_folder
from deca_ds.checkpoint.steps import step_folder, steps_in
from deca_ds.config.schema import CheckpointConfig
from deca_ds.engine.state import TrainingState
from deca_ds.errors import CheckpointError, DivergedError
from deca_ds.launch.progress import Progress
from deca_ds.launch.store import JobStore
from deca_ds.launch.view import View
from deca_ds.tools.disk import Stored, disk_need, taken
from deca_ds.training import checkpoints as module
from deca_ds.training.checkpoints import Checkpoints
from deca_ds.training.completion import CompletionByStore

SIZES = (3, 4, 6, 5)  # elements of a block each
STORED = Stored(tuple(4 * n for n in SIZES), tuple(8 * n for n in SIZES), frozen=28, buffers=16)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch) -> None:
    monkeypatch.setattr(write_shards, "sync", lambda path: None)


class Trained:
    """A client of one rank that has made `done` inner steps: every block holds the number of its last one."""

    def __init__(self, schedule: Schedule) -> None:
        self.device, self.schedule, self.done = torch.device("cpu"), schedule, 0
        self.shapes = {f"w{i}": (n,) for i, n in enumerate(SIZES)} | {"base": (7,)}
        self.dtypes = dict.fromkeys(self.shapes, torch.float32)
        self.values = dict.fromkeys(self.shapes, 0.0)
        blocks = [SimpleNamespace(label=f"layer {i}", names=(f"w{i}",)) for i in range(len(SIZES))]
        self.plan = SimpleNamespace(blocks=blocks, frozen=("base",))

    def train(self, done: int) -> None:
        for index in range(self.done, done):
            self.values[f"w{self.schedule.step(index).block}"] = float(index + 1)
        self.done = done

    @property
    def active(self):
        return None if not list(self.block_shards()) else SimpleNamespace(local_steps=LocalSteps([1], [True]))

    def masters(self, names):
        for name in names:
            yield name, 0, *self.shapes[name], torch.full(self.shapes[name], self.values[name]), None

    def set_master(self, name, values):
        raise AssertionError("saving changes nothing")

    def block_shards(self):
        if self.done < len(self.schedule) and (step := self.schedule.step(self.done)).inner:
            name = f"w{step.block}"
            state = {key: torch.full(self.shapes[name], float(self.done)) for key in ("theta", "grad", "m", "v")}
            yield name, 0, *self.shapes[name], state

    def buffers(self):
        return iter([("c", torch.full((2,), self.done))])


class Count(CompletionByStore):
    """late: another rank writes nothing, so that no checkpoint is complete."""

    late = False

    def complete(self, step: int) -> bool:
        return not self.late and super().complete(step)


class Job:
    """One rank, of a client of `ranks`, that trains along a schedule and saves."""

    def __init__(
        self,
        folder: Path,
        schedule: Schedule,
        *,
        resumed: int | None = None,
        known: dict | None = None,
        ranks: int = 1,
        **config: int,
    ):
        self.folder = folder
        gossip = SimpleNamespace(schedule=SimpleNamespace(matrices=(np.eye(1),)), bytes_sent=0, wait_seconds=0.0)
        cluster = SimpleNamespace(
            client=0, clients=1, shard=0, ranks=ranks, is_job_leader=True, members=View.of_all(1),
            launch=SimpleNamespace(world_size=1), progress=Progress(),
            store=JobStore(HashStore(), None, timedelta(seconds=100)),
        )  # fmt: skip
        self.client, self.config = Trained(schedule), CheckpointConfig(**config)
        options = {"folder": folder, "attempt": 1, "timeout_s": 100.0, "resumed": resumed}
        self.written = Count(cluster, 1, 100.0)
        self.state = TrainingState(self.client, SimpleNamespace(buffers=("m", "v")), schedule, gossip)
        self.state.best = known or {}
        self.saver = Checkpoints(self.config, cluster, self.state, gossip, self.written, **options)

    def save(self, *steps: int, best: bool = False) -> None:
        for done in steps:
            self.train(done)
            self.saver.save(best=best)
            self.saver.wait()

    def train(self, done: int) -> None:
        self.client.train(done)
        self.state.done = done

    def open(self, step: int):
        return open_checkpoint(self.folder, step, Part(0, 0, 1))

    def assert_holds(self, step: int) -> None:
        """What the client had after `step` inner steps, every checksum compared."""
        client, saved = Trained(self.client.schedule), self.open(step)
        client.train(step)
        for name, value in client.values.items():
            assert torch.equal(saved.read(name, 0), torch.full(client.shapes[name], value)), (step, name)
        assert torch.equal(saved.read("c", 0), torch.full((2,), step))
        moments = [f"{key}/{name}" for name, *_ in client.block_shards() for key in "mv"]
        assert set(saved.names) == {*client.values, "c", *moments}


def files(folder: Path, step: int) -> dict[str, int]:
    """Inodes by name."""
    here = rank_folder(step_folder(folder, step), 0, 0)
    return {path.name: path.stat().st_ino for path in here.glob("*.safetensors")}


def shared(folder: Path, one: int, other: int) -> list[str]:
    return sorted(name for name, _ in files(folder, one).items() & files(folder, other).items())


def payload(folder: Path) -> int:
    """Bytes of tensors, files with several names once."""
    paths = {path.stat().st_ino: path for path in folder.rglob("*.safetensors")}
    contents = (path.read_bytes() for path in paths.values())
    return sum(len(content) - 8 - int.from_bytes(content[:8], "little") for content in contents)


SCHEDULE = Schedule(rounds=2, blocks=4, inner_steps=3)


def test_only_what_was_trained_since_the_oldest_that_stays_is_written(tmp_path: Path) -> None:
    job = Job(tmp_path, SCHEDULE, keep=2)
    job.save(2, 4)
    job.written.late = True  # nothing is removed
    job.save(7, 8, 9)
    assert steps_in(tmp_path) == [2, 4, 7, 8, 9]
    names = ["000_layer-0", "001_layer-1", "002_layer-2", "003_layer-3", "004_frozen"]
    layers = {name: f"{name}.safetensors" for name in names}
    # blocks 0 to 2 were trained between 2 and 7, blocks 1 and 2 between 4 and 8, block 2 between 7 and 9
    assert shared(tmp_path, 2, 7) == [layers["003_layer-3"], layers["004_frozen"]]
    assert shared(tmp_path, 4, 8) == [layers[name] for name in names if name[2] in "034"]
    assert shared(tmp_path, 7, 9) == [layers[name] for name in names if name[2] in "0134"]
    for step in (2, 4, 7, 8, 9):
        job.assert_holds(step)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_checkpoints_that_stay_do_not_depend_on_those_that_go(tmp_path: Path, monkeypatch, keep: int) -> None:
    job = Job(tmp_path, SCHEDULE, keep=keep)
    linked, link = [], os.link
    monkeypatch.setattr(os, "link", lambda source, target: linked.append(target.name) or link(source, target))
    for done in range(1, len(SCHEDULE) + 1):
        job.save(done)
        stay = steps_in(tmp_path)
        assert stay == list(range(max(1, done - keep + 1), done + 1))
        assert not any(shared(tmp_path, *pair) for pair in combinations(stay, 2))
        for step in stay:
            job.assert_holds(step)
    assert linked.count("004_frozen.safetensors") == len(SCHEDULE) - keep and "000_layer-0.safetensors" in linked
    damaged = next(step_folder(tmp_path, done).rglob("004_frozen.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    for step in stay:
        if step == done:
            with pytest.raises(CheckpointError, match="frozen"):
                job.open(step)
        else:
            job.assert_holds(step)


@pytest.mark.parametrize("why", [errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV, errno.EMLINK])
def test_without_hard_links_all_is_written_and_said_once(tmp_path: Path, monkeypatch, capfd, why: int) -> None:
    def refuse(*_, **__):
        raise OSError(why, os.strerror(why))

    monkeypatch.setattr(os, "link", refuse)
    job = Job(tmp_path, SCHEDULE, keep=1)
    job.written.late = True  # nothing is removed
    job.save(1, 2, 5)
    for done in (1, 2, 5):
        job.assert_holds(done)
    assert not any(shared(tmp_path, *pair) for pair in combinations((1, 2, 5), 2))
    told = capfd.readouterr().err
    assert told.count("every checkpoint is written whole") == 1 and os.strerror(why) in told


def test_what_cannot_be_linked_file_by_file_is_written(tmp_path: Path, monkeypatch) -> None:
    link = os.link

    def full(source, target):
        if "003" in str(source):
            raise OSError(errno.EMLINK, "Too many links")
        link(source, target)

    monkeypatch.setattr(os, "link", full)
    job = Job(tmp_path, SCHEDULE, keep=2)
    job.written.late = True
    job.save(1, 2, 3)
    assert [name[:3] for name in shared(tmp_path, 1, 3)] == ["001", "002", "004"]
    job.assert_holds(3)


@pytest.mark.parametrize("lost", ["all", "a file", "some bytes", "the manifest", "a bit of the manifest"])
def test_an_earlier_one_that_is_not_as_it_was_written_is_not_built_on(tmp_path: Path, lost: str) -> None:
    job = Job(tmp_path, SCHEDULE, keep=1)
    job.save(1)
    part = rank_folder(step_folder(tmp_path, 1), 0, 0)
    manifest = part / "manifest.json"
    if lost == "all":
        shutil.rmtree(tmp_path)
    elif lost == "a file":
        (part / "002_layer-2.safetensors").unlink()
    elif lost == "some bytes":
        os.truncate(part / "002_layer-2.safetensors", 10)
    elif lost == "the manifest":
        manifest.unlink()
    else:
        manifest.write_text(manifest.read_text().replace("layer-2", "layer-3", 1))
    job.written.late = True
    job.save(2)
    assert lost == "all" or shared(tmp_path, 1, 2) == []
    job.assert_holds(2)


@pytest.mark.parametrize(("ranks", "links"), [(1, True), (2, False)])
def test_a_run_that_continued_builds_on_what_it_continued_from(tmp_path: Path, ranks: int, links: bool) -> None:
    before = Job(tmp_path, SCHEDULE, keep=1, ranks=ranks)
    before.save(4)
    job = Job(tmp_path, SCHEDULE, keep=1, resumed=4)
    job.train(4)
    job.written.late = True
    job.save(5)
    assert [name[:3] for name in shared(tmp_path, 4, 5)] == (["000", "002", "003", "004"] if links else [])
    job.assert_holds(5)


def test_what_is_shared_takes_its_room_once(tmp_path: Path) -> None:
    assert taken(tmp_path) == 0
    job = Job(tmp_path / "checkpoints", SCHEDULE, keep=1)
    job.written.late = True
    job.save(1, 2)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/w.safetensors").write_bytes(b"123")
    sizes = {path.stat().st_ino: path.stat().st_size for path in tmp_path.rglob("*.safetensors")}
    assert len(sizes) == 8 + 4 + 1 and taken(tmp_path) == sum(sizes.values())


def test_a_state_that_must_not_be_saved_leaves_no_links_behind(tmp_path: Path) -> None:
    job = Job(tmp_path, SCHEDULE, keep=1)
    job.save(1)
    job.train(2)
    job.client.values["w0"] = float("nan")
    with pytest.raises(DivergedError, match="w0 is not finite"):
        job.saver.save()
    assert steps_in(tmp_path) == [1] and job.saver.newest() == 1
    job.assert_holds(1)


@pytest.mark.parametrize(
    ("every", "inner_steps", "keep", "order"),
    [
        (1, 1, 2, "ascending"),
        (1, 3, 1, "random"),
        (2, 3, 2, "random"),
        (3, 3, 2, "ascending"),
        (5, 2, 3, "random"),
        (7, 3, 2, "ascending"),
        (24, 3, 2, "ascending"),
        (25, 3, 1, "ascending"),
    ],
)
def test_the_disk_that_a_run_is_said_to_need_is_what_it_takes(
    tmp_path: Path, monkeypatch, every: int, inner_steps: int, keep: int, order: str
) -> None:
    schedule = Schedule(rounds=2, blocks=4, inner_steps=inner_steps, order=order, seed=3)
    most, last, save_shards = 0, 0, module.save_shards

    def measured(*arguments, **options):
        nonlocal most, last
        save_shards(*arguments, **options)
        last = payload(tmp_path)  # the oldest goes when all ranks have written
        most = max(most, last)

    monkeypatch.setattr(module, "save_shards", measured)
    job = Job(tmp_path, schedule, every=every, keep=keep)
    for done in range(1, len(schedule) + 1):
        job.train(done)
        job.saver.after_step()
        job.saver.wait()
    job.saver.save()  # before the last evaluation; there may be one already
    job.saver.wait()
    need = disk_need(STORED, schedule, job.config)
    assert need.checkpoints == most
    assert need.model == 4 * (sum(SIZES) + 7) + 16
    assert need.most == max(most, last + need.model)


def test_the_best_checkpoint_stays_until_a_better_one_is_complete_and_shares_no_file(tmp_path: Path) -> None:
    job = Job(tmp_path, SCHEDULE, keep=1, best=True)
    job.save(2)
    job.save(4, best=True)
    job.save(6, 8)
    assert steps_in(tmp_path) == [4, 8] and not shared(tmp_path, 4, 8)
    job.assert_holds(4)
    job.save(9, best=True)
    assert steps_in(tmp_path) == [9]
    job.save(11)
    job.saver.forget()
    assert steps_in(tmp_path) == [9], "the run is through, and this is still the best"


def test_a_run_that_continues_keeps_the_best_checkpoint_of_before(tmp_path: Path) -> None:
    Job(tmp_path, SCHEDULE, keep=1, best=True).save(3, 6, best=True)
    job = Job(tmp_path, SCHEDULE, resumed=6, keep=1, best=True, known={"step": 6})
    job.train(6)
    job.save(8, 10)
    assert steps_in(tmp_path) == [6, 10]
    job.save(11, best=True)
    assert steps_in(tmp_path) == [11]


def test_a_run_that_keeps_the_best_takes_no_more_disk_than_it_is_said_to_need(tmp_path: Path) -> None:
    job, most = Job(tmp_path, SCHEDULE, every=2, keep=2, best=True), 0
    for done in range(1, len(SCHEDULE) + 1):
        job.save(done, best=done % 3 == 0)
        most = max(most, payload(tmp_path))
    assert most <= disk_need(STORED, SCHEDULE, job.config).checkpoints


def test_a_run_without_regular_checkpoints_is_said_to_need_one(tmp_path: Path) -> None:
    need = disk_need(STORED, SCHEDULE, CheckpointConfig())
    most = 0
    for done in range(1, len(SCHEDULE) + 1):
        job = Job(tmp_path / str(done), SCHEDULE)
        job.save(done)
        most = max(most, payload(job.folder))
    assert need.checkpoints == most
    assert need.most == max(most, 2 * need.model), "at the end the model lies beside a checkpoint without an open block"

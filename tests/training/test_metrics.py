import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from deca_ds.config.schema import LoggingConfig
from deca_ds.errors import CheckpointError
from deca_ds.launch.progress import Progress
from deca_ds.training.metrics import JsonLines, Metrics, flat_numbers


def test_lines_are_on_disk_as_soon_as_written(tmp_path):
    lines = JsonLines(tmp_path / "deep" / "m.jsonl")
    lines.write({"step": 1})
    lines.write({"step": 2})
    assert [json.loads(line) for line in (tmp_path / "deep" / "m.jsonl").read_text().splitlines()] == [
        {"step": 1},
        {"step": 2},
    ]
    lines.close()


def test_numbers_of_nested_records_have_paths():
    record = {"own": {"loss": 1.5, "recall": {"red": 1}}, "block": "layer 0", "lr": 0.1}
    assert dict(flat_numbers(record)) == {"own/loss": 1.5, "own/recall/red": 1.0, "lr": 0.1}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_one_message():
    lines = JsonLines(Path("/dev/full"))
    with pytest.raises(CheckpointError, match=r"cannot write the metrics: No space left on device") as caught:
        lines.write({"kind": "step", "step": 1})
    assert "/dev/full" in str(caught.value) and "run.resume=require" in str(caught.value)


def test_tensorboard_has_the_numbers_of_the_lines(tmp_path):
    """The job's, too: the mean model and the consensus distance."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rank = SimpleNamespace(client=1, is_leader=True, is_job_leader=True, progress=Progress())
    shown = SimpleNamespace(step=lambda *_: None, evaluated=lambda *_: None, show=lambda: None, close=lambda: None)
    written = Metrics(LoggingConfig(tensorboard=True), rank, tmp_path, range(8), shown)
    written.step(SimpleNamespace(index=3, block=0), {"loss": 1.5, "block": "layers 0-1"})
    own = {"own": {"loss": 1.25, "examples": 4}, "seconds": 0.5}
    written.evaluation(4, own, {"consensus_distance": 0.5, "mean": {"loss": 1.0, "examples": 4}, "clients": {"1": own}})
    written.close()

    def scalars(name):
        events = EventAccumulator(str(tmp_path / "tensorboard" / name)).Reload()
        return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}

    assert scalars("client_001")["step/loss"] == [(4, 1.5)]
    assert scalars("client_001")["evaluation/own/loss"] == [(4, 1.25)]
    assert scalars("job")["evaluation/consensus_distance"] == [(4, 0.5)]
    assert scalars("job")["evaluation/mean/loss"] == [(4, 1.0)]
    assert scalars("job")["evaluation/clients/1/own/loss"] == [(4, 1.25)]


def test_another_rank_writes_the_jobs_events_when_the_first_has_gone(tmp_path):
    rank = SimpleNamespace(client=1, is_leader=True, is_job_leader=False, progress=Progress())
    shown = SimpleNamespace(show=lambda: None, close=lambda: None)
    written = Metrics(LoggingConfig(tensorboard=True), rank, tmp_path, range(8), shown)
    assert not (tmp_path / "tensorboard" / "job").exists()
    rank.is_job_leader = True
    written.membership(3, {"left": [1]})
    written.close()
    assert list((tmp_path / "tensorboard" / "job").glob("events*"))

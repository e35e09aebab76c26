import json
from pathlib import Path

import pytest

from deca_ds.errors import CheckpointError
from deca_ds.training.metrics import JsonLines, _numbers


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
    assert dict(_numbers(record)) == {"own/loss": 1.5, "own/recall/red": 1.0, "lr": 0.1}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_one_message():
    lines = JsonLines(Path("/dev/full"))
    with pytest.raises(CheckpointError, match=r"cannot write the metrics: No space left on device") as caught:
        lines.write({"kind": "step", "step": 1})
    assert "/dev/full" in str(caught.value) and "run.resume=require" in str(caught.value)

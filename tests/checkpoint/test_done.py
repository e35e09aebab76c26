"""DONE, STOPPED and FAILED: one of them alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from deca_ds.checkpoint import done
from deca_ds.checkpoint.done import ended, is_done, mark_done, mark_stopped, missing_clients
from deca_ds.errors import CheckpointError
from deca_ds.watchdog.failure import Failure

FAILURE = Failure(0, "n1", "the end", "a terminal is gone \u2501 \udcff", 1)


def test_the_last_word_stands_alone(tmp_path: Path) -> None:
    FAILURE.mark(tmp_path, "FAILED")
    assert ended(tmp_path) == ["FAILED"]
    mark_stopped(tmp_path, "3 of 8 inner steps", "again")
    assert ended(tmp_path) == ["STOPPED"] and not is_done(tmp_path)
    mark_done(tmp_path, "8 of 8 inner steps", [1])
    FAILURE.mark(tmp_path, "FAILED")
    assert ended(tmp_path) == ["DONE"] and missing_clients(tmp_path) == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["DONE"]
    FAILURE.mark(tmp_path, "FAILED_client_001")  # that of a client that the others have finished without
    assert sorted(path.name for path in tmp_path.iterdir()) == ["DONE", "FAILED_client_001"]


def test_a_run_whose_files_do_not_come_to_the_disk_is_not_done(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "config.yaml").touch()

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(done, "sync", full)
    with pytest.raises(CheckpointError, match="cannot mark the run DONE: No space left"):
        mark_done(tmp_path, "8 of 8 inner steps")
    assert ended(tmp_path) == []

"""DONE, STOPPED and FAILED: one of them alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from deca_ds.checkpoint import done
from deca_ds.checkpoint.done import (
    ended,
    inner_steps,
    is_done,
    mark_done,
    mark_stopped,
    missing_clients,
    steps_told,
)
from deca_ds.errors import CheckpointError
from deca_ds.watchdog.failure import Failure

FAILURE = Failure(0, "n1", "the end", "a terminal is gone \u2501 \udcff", 1)


def test_the_last_word_stands_alone(tmp_path: Path) -> None:
    FAILURE.mark(tmp_path, "FAILED")
    assert ended(tmp_path) == "FAILED"
    mark_stopped(tmp_path, "again", steps=(3, 8))
    assert ended(tmp_path) == "STOPPED" and not is_done(tmp_path)
    mark_done(tmp_path, 8, [1])
    FAILURE.mark(tmp_path, "FAILED")
    assert ended(tmp_path) == "DONE" and missing_clients(tmp_path) == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["DONE"]
    FAILURE.mark(tmp_path, "FAILED_client_001")  # that of a client that the others have finished without
    assert sorted(path.name for path in tmp_path.iterdir()) == ["DONE", "FAILED_client_001"]


def test_a_run_whose_files_do_not_come_to_the_disk_is_not_done(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "config.yaml").touch()

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(done, "sync", full)
    with pytest.raises(CheckpointError, match="cannot mark the run DONE: No space left"):
        mark_done(tmp_path, 8)
    assert ended(tmp_path) is None


class Meanwhile:
    """Has another process act just before the call number `at` of those that one process makes to the file system."""

    def __init__(self, monkeypatch, at: int, act: Callable[[], None]):
        self.calls, self._at, self._act, self._acts = 0, at, act, False
        for owner, name in ((os, "replace"), (os, "link"), (Path, "unlink"), (Path, "exists"), (Path, "write_text")):
            monkeypatch.setattr(owner, name, self._counting(getattr(owner, name)))

    def _counting(self, function: Callable[..., object]) -> Callable[..., object]:
        def counting(*arguments: object, **options: object) -> object:
            if not self._acts:
                self.calls += 1
                if self.calls == self._at:
                    self._acts = True
                    self._act()
                    self._acts = False
            return function(*arguments, **options)

        return counting


@pytest.mark.parametrize("marker", ["DONE", "STOPPED"])
@pytest.mark.parametrize("first", ["a rank fails", "the run ends"])
def test_who_fails_while_the_run_is_marked_leaves_no_other_word(tmp_path: Path, first: str, marker: str) -> None:
    """At whatever moment the one begins, while the other is at it."""

    def mark(run: Path) -> None:
        mark_done(run, 8) if marker == "DONE" else mark_stopped(run, "again", steps=(3, 8))

    def fail(run: Path) -> None:
        FAILURE.mark(run, "FAILED")

    def run_them(at: int) -> tuple[Path, int]:
        run = tmp_path / str(at)
        run.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            meanwhile = Meanwhile(patch, at, lambda: other(run))
            one(run)
        return run, meanwhile.calls

    one, other = (fail, mark) if first == "a rank fails" else (mark, fail)
    _, calls = run_them(0)
    for at in range(1, calls + 1):
        run, _ = run_them(at)
        assert [path.name for path in run.iterdir()] == [marker], f"call {at} of {calls}"


def test_who_is_killed_before_it_has_removed_the_other_marker_leaves_one_that_counts(tmp_path: Path) -> None:
    mark_done(tmp_path, 8)
    (tmp_path / "FAILED").touch()
    assert ended(tmp_path) == "DONE"


def test_at_no_moment_a_run_that_has_failed_and_is_marked_is_without_a_marker(tmp_path: Path, monkeypatch) -> None:
    """Its process may be killed at any."""
    unlink = Path.unlink

    def looks(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok)
        assert ended(tmp_path) in ("FAILED", "DONE")

    FAILURE.mark(tmp_path, "FAILED")
    monkeypatch.setattr(Path, "unlink", looks)
    mark_done(tmp_path, 8)
    assert ended(tmp_path) == "DONE"


def test_the_length_of_a_run_is_a_field_of_its_marker(tmp_path):
    mark_stopped(tmp_path, "again", [1], steps=(3, 8), why="2 evaluations in a row found no lower loss")
    assert steps_told((tmp_path / "STOPPED").read_text()) == 8
    mark_stopped(tmp_path, "again")
    assert steps_told((tmp_path / "STOPPED").read_text()) is None
    mark_done(tmp_path, 8, [1])
    assert inner_steps(tmp_path) == 8


def test_a_marker_of_an_earlier_version_tells_who_is_missing_and_is_refused_where_its_length_counts(tmp_path):
    (tmp_path / "DONE").write_text("8 of 8 inner steps\nmissing clients: 0, 3\n")
    assert missing_clients(tmp_path) == [0, 3]
    with pytest.raises(CheckpointError, match=r"DONE does not say how many inner steps[\s\S]*`inner steps: N of N`"):
        inner_steps(tmp_path)

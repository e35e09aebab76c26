"""`deca stop`: a job is asked through its folder, and the answer waited for."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from test_status import beat

from deca_ds.checkpoint.done import mark_stopped
from deca_ds.cli import main
from deca_ds.tools import stop
from deca_ds.tools.status import look, watch
from deca_ds.watchdog.stop import forget_request, is_requested


@pytest.mark.parametrize(("marker", "code"), [("STOPPED", 0), ("DONE", 0), ("FAILED", 1)])
def test_a_job_is_asked_and_its_end_is_told(tmp_path: Path, monkeypatch, capsys, marker: str, code: int) -> None:
    beat(tmp_path, 0)

    def ends(folder: Path, show):
        assert is_requested(folder)
        if marker == "STOPPED":
            mark_stopped(folder, "the same command", steps=(5, 9))
        else:
            (folder / marker).write_text("inner steps: 5 of 9\n")
        return look(folder)

    monkeypatch.setattr(stop, "watch", ends)
    assert main(["stop", str(tmp_path)]) == code
    told = capsys.readouterr().out
    assert f"{marker}: inner steps: 5 of 9" in told and ("to continue: the same command" in told) == (
        marker == "STOPPED"
    )


@pytest.mark.parametrize(("silent_s", "marker", "code"), [(90.0, None, 4), (90.0, "STOPPED", 0), (90.0, "FAILED", 1)])
def test_where_no_job_is_at_work_nobody_is_asked(tmp_path: Path, capsys, silent_s, marker, code) -> None:
    beat(tmp_path, 0, silent_s=silent_s)
    if marker:
        (tmp_path / marker).write_text("words\n")
    assert main(["stop", str(tmp_path)]) == code
    assert "nothing to stop" in capsys.readouterr().out and not is_requested(tmp_path)


def test_a_job_that_starts_meanwhile_is_asked_again(tmp_path: Path, monkeypatch) -> None:
    """It forgets what the one before, which was killed a moment ago, was asked."""
    beat(tmp_path, 0)
    steps = iter([forget_request, lambda run: None, lambda run: mark_stopped(run, "the same command", steps=(5, 9))])
    asked = []

    def pause(seconds: float) -> None:
        asked.append(is_requested(tmp_path))
        next(steps)(tmp_path)

    monkeypatch.setattr(stop, "watch", partial(watch, sleep=pause))
    assert main(["stop", str(tmp_path)]) == 0
    assert asked == [True] * 3 and not is_requested(tmp_path), "an end that came before it was looked at leaves none"


def test_a_folder_that_is_no_run_s_is_refused(tmp_path: Path, capsys) -> None:
    assert main(["stop", str(tmp_path)]) == 2
    assert "no heartbeats" in capsys.readouterr().err
    forget_request(tmp_path)  # of which there is none

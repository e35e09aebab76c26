"""`deca status`: a table of heartbeats, stale ones marked, exit codes that tell the truth, and clear words for a folder
that is no run's."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict

import pytest

from deca_ds.cli import main
from deca_ds.launch.progress import EVERYBODY
from deca_ds.run_folder import HEARTBEATS
from deca_ds.tools.status import look, told_end, watch
from deca_ds.watchdog.heartbeats import Heartbeat


def beat(run, rank, silent_s=0.0, host=None, awaits=None, phase="gossip"):
    (run / HEARTBEATS).mkdir(exist_ok=True)
    note = Heartbeat(rank, host or f"n{rank}", rank, phase, 412000, "layers 0-1", awaits, 3.0, time.time() - silent_s)
    (run / HEARTBEATS / f"rank_{rank:04d}.json").write_text(json.dumps(asdict(note)))


def test_the_table_marks_who_gives_no_sign_of_life(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    beat(tmp_path, 0, awaits=1)
    beat(tmp_path, 1, silent_s=3700.0)
    assert main(["status", str(tmp_path)]) == 4
    table = capsys.readouterr().out
    assert "gossip, waiting for client 1" in table and table.count("412000") == 2 and table.count("stale") == 1
    assert "no sign of life for 1:01:4" in table and "has not ended" not in table
    beat(tmp_path, 0, silent_s=90.0)
    assert main(["status", str(tmp_path), "--watch"]) == 4, "nobody is left to be watched"
    assert "no rank gives a sign of life" in capsys.readouterr().out
    (tmp_path / "FAILED").write_text("rank 1 on n1\nout of [b]memory\n")
    assert main(["status", str(tmp_path)]) == 1
    ended = capsys.readouterr().out
    assert "out of [b]memory" in ended and "stale" not in ended, "a run that has ended is not stale"


@pytest.mark.parametrize(("marker", "code"), [("DONE", 0), ("STOPPED", 3), ("FAILED", 1), (None, 0)])
def test_the_exit_code_is_how_the_run_is(tmp_path, marker, code, capsys):
    beat(tmp_path, 0, silent_s=90.0 if marker else 0.0)
    told = "a line of many words, " * 9
    if marker:
        (tmp_path / marker).write_text(f"{told}\n")
    assert main(["status", str(tmp_path)]) == code
    assert (f"{marker}: {told.strip()}\n" in capsys.readouterr().out) == bool(marker), "whole where no terminal is"


def test_of_two_markers_the_one_that_counts_is_told(tmp_path, capsys):
    """A rank that failed while DONE was being written was killed before it had removed its FAILED."""
    beat(tmp_path, 0, silent_s=90.0)
    for marker in ("DONE", "FAILED"):
        (tmp_path / marker).write_text("words\n")
    assert main(["status", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "DONE: words" in told and "FAILED" not in told


def test_every_column_is_readable_at_80_columns(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    host = "trainer-worker-0.deca-headless.research-namespace.svc"
    beat(tmp_path, 0, host=host, awaits=117, phase="saving a checkpoint: waiting for all ranks")
    beat(tmp_path, 1023, silent_s=100_000)
    (tmp_path / "metrics").mkdir()
    lines = [
        {"kind": "step", "step": 1, "loss": 9.0},
        {"kind": "step", "step": 2, "loss": 12.34567},
        {"kind": "evaluation"},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "step", "step": 3, "lo'
    (tmp_path / "metrics" / "client_000.jsonl").write_text(text)
    main(["status", str(tmp_path)])
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80 and "…" not in said
    words = set(said.split())
    assert {"rank", "host", "client", "phase", "step", "loss", "1023", "412000", "12.346"} <= words
    cells = [line for line in said.splitlines()]
    start = next(line for line in cells if line.startswith("rank")).index("host")
    assert host in "".join(line[start:].split(" ")[0] for line in cells), "a long name continues below, whole"


@pytest.mark.parametrize("awaits", [117, EVERYBODY])
def test_a_rank_that_waits_keeps_to_one_line_of_80_columns(tmp_path, capsys, monkeypatch, awaits):
    monkeypatch.setenv("COLUMNS", "80")
    beat(tmp_path, 64, host="n064", awaits=awaits)
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "client_064.jsonl").write_text(json.dumps({"kind": "step", "loss": 12.3456}) + "\n")
    main(["status", str(tmp_path)])
    last = capsys.readouterr().out.splitlines()[-1].split()
    waits = "everybody" if awaits == EVERYBODY else "client 117"
    assert last == f"64 n064 64 gossip, waiting for {waits} 412000 12.346 0:03 ago".split()


def changes(run, *members: tuple[int, list[int]]) -> None:
    """From a step on, these clients are missing."""
    lines = [
        {"kind": "membership", "step": step, "from_step": step, "missing": missing, "clients": [0]}
        for step, missing in members
    ]
    (run / "metrics").mkdir(exist_ok=True)
    (run / "metrics" / "job.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in [{"kind": "evaluation", "step": 0}, *lines])
        + '{"kind": "membership", "step": 9, "from_st'
    )


def phases(run, capsys) -> list[str]:
    """By rank, the first line of each."""
    main(["status", str(run)])
    lines = capsys.readouterr().out.splitlines()
    head = next(number for number, line in enumerate(lines) if line.startswith("rank"))
    start = lines[head].index("phase")
    return [line[start:].rpartition(" 412000 ")[0].strip() for line in lines[head + 2 :] if " 412000 " in line]


@pytest.mark.parametrize("marker", ["DONE", "STOPPED", "FAILED"])
def test_a_client_without_which_the_run_has_ended_is_missing_whatever_it_did_last(
    tmp_path, capsys, monkeypatch, marker
):
    """Of its metrics and markers the folder may have some: without a shared file system, those of this host."""
    monkeypatch.setenv("COLUMNS", "80")
    beat(tmp_path, 0, silent_s=3.0, phase="done")
    beat(tmp_path, 1, silent_s=90_000.0, awaits=117)
    beat(tmp_path, 2, silent_s=3.0, phase="waiting to be let in")  # it came back as the run ended
    (tmp_path / marker).write_text("8 of 8 inner steps\nmissing clients: 1, 2\n")
    if marker != "FAILED":  # which does not name them
        assert phases(tmp_path, capsys) == ["done", "missing", "missing"]
    changes(tmp_path, (3, [2]), (4, []), (412000, [1]), (412001, [1, 2]))
    assert phases(tmp_path, capsys) == ["done", "missing since step 412000", "missing since step 412001"]
    main(["status", str(tmp_path)])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_a_client_without_which_the_run_continues_is_missing_until_it_shows_life(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    beat(tmp_path, 0)
    beat(tmp_path, 1, silent_s=90_000.0)
    beat(tmp_path, 2, silent_s=90_000.0)
    changes(tmp_path, (3, [1, 2]), (5, [1]))
    assert phases(tmp_path, capsys) == ["gossip", "missing since step 3", "gossip"], "client 2 came back, and is silent"
    assert main(["status", str(tmp_path)]) == 4
    assert capsys.readouterr().out.count("stale: no sign of life") == 2
    beat(tmp_path, 1, phase="loading the model")
    assert phases(tmp_path, capsys) == ["gossip", "loading the model", "gossip"]


def test_ranks_of_an_earlier_larger_start_are_no_longer_of_the_run(tmp_path):
    beat(tmp_path, 0)
    beat(tmp_path, 1, silent_s=90.0)
    assert look(tmp_path).code == 4
    (tmp_path / "starts.json").write_text(json.dumps([{"ranks": [1, 1]}, {"ranks": [1]}]))
    assert look(tmp_path).code == 0


def test_a_run_that_is_continued_has_not_ended_though_the_marker_is_there_until_it_has_loaded(tmp_path):
    (tmp_path / "STOPPED").write_text("words\n")
    (tmp_path / "LOCK").touch()
    later = (tmp_path / "STOPPED").stat().st_mtime_ns + 1
    os.utime(tmp_path / "LOCK", ns=(later, later))
    beat(tmp_path, 0, phase="verifying the checkpoints")
    assert (look(tmp_path).code, look(tmp_path).is_over) == (0, False)
    beat(tmp_path, 0, silent_s=90.0)  # it was refused
    assert (look(tmp_path).code, look(tmp_path).is_over) == (3, True)
    beat(tmp_path, 0)
    os.utime(tmp_path / "STOPPED", ns=(later, later))  # it has stopped again, a moment ago
    assert (look(tmp_path).code, look(tmp_path).is_over) == (3, True)


def test_a_marker_that_a_job_removes_at_this_moment_is_not_told(tmp_path):
    beat(tmp_path, 0)
    (tmp_path / "STOPPED").write_text("words\n")
    state = look(tmp_path)
    assert told_end(state) == "STOPPED: words"
    (tmp_path / "STOPPED").unlink()
    assert told_end(state) == ""


@pytest.mark.parametrize(("marker", "code"), [("DONE", 0), ("STOPPED", 3), ("FAILED", 1), (None, 4)])
def test_a_watch_ends_with_the_run(tmp_path, marker, code):
    beat(tmp_path, 0)
    beat(tmp_path, 1, silent_s=90.0)  # a lost rank does not end the watch: the run may continue, or say why it ends
    seen = []

    def later(seconds):
        if len(seen) == 3:
            beat(tmp_path, 0, silent_s=0.0 if marker else 90.0)
            if marker:
                (tmp_path / marker).write_text("words\n")

    assert watch(tmp_path, seen.append, later).code == code
    assert len(seen) == 4


def test_a_folder_that_is_no_run_is_named(tmp_path, capsys):
    assert main(["status", str(tmp_path)]) == 2
    assert f"no heartbeats in '{tmp_path}', which is no run's folder" in capsys.readouterr().err
    (tmp_path / HEARTBEATS).mkdir()  # before the first one is written
    assert main(["status", str(tmp_path)]) == 2
    assert f"no heartbeats in '{tmp_path}'" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("")
    assert main(["status", str(tmp_path)]) == 2
    assert "which is no run's folder" not in capsys.readouterr().err
    for command in ("status", "stop"):
        assert main([command, str(tmp_path / "away")]) == 2
        assert f"there is no folder '{tmp_path / 'away'}'" in capsys.readouterr().err


def test_a_heartbeat_of_another_version_is_named(tmp_path, capsys):
    beat(tmp_path, 0)
    (tmp_path / HEARTBEATS / "rank_0001.json").write_text('{"rank": 1, "mood": "fine"}')
    assert main(["status", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "no heartbeat of this version of deca_ds" in told and "rank_0001.json" in told and "fix:" in told


def test_metrics_of_another_version_count_as_missing(tmp_path):
    beat(tmp_path, 0)
    (tmp_path / "metrics").mkdir()
    step, members = '{"kind": "step", ', '{"kind": "membership", '
    known = f'{step}"loss": 2.5}}\n{step}"nats": 2.0}}\n{step}"loss": null}}\n{step}loss: 1}}\n'
    (tmp_path / "metrics" / "client_000.jsonl").write_text(known)
    known = (
        f'{members}"from_step": 4, "missing": [1]}}\n{members}"gone": [2]}}\n{members}"from_step": 5, "missing": 2}}\n'
    )
    (tmp_path / "metrics" / "job.jsonl").write_text(known)
    state = look(tmp_path)
    assert state.losses == {0: 2.5} and state.missing == {1: 4}

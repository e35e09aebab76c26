"""`deca status`: a table of heartbeats, stale ones marked, and clear words for a folder that is no run's."""

from __future__ import annotations

import json
import time
from dataclasses import asdict

from deca_ds.cli import main
from deca_ds.watchdog.heartbeats import FOLDER, Heartbeat


def test_the_table_marks_who_gives_no_sign_of_life(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    folder = tmp_path / FOLDER
    folder.mkdir()
    for rank, silent_s, awaits in ((0, 0.0, 1), (1, 90.0, None)):
        beat = Heartbeat(rank, f"n{rank}", rank, "gossip", 412, "layers 0-1", awaits, 3.0, time.time() - silent_s)
        (folder / f"rank_{rank:04d}.json").write_text(json.dumps(asdict(beat)))
    assert main(["status", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert "gossip, waiting for client 1" in table and table.count("412") == 2 and table.count("stale") == 1
    assert "no sign of life for 9" in table
    (tmp_path / "FAILED").write_text("rank 1 on n1\nout of memory\n")
    assert main(["status", str(tmp_path)]) == 0
    ended = capsys.readouterr().out
    assert "out of memory" in ended and "stale" not in ended, "a run that has ended is not stale"


def test_a_folder_that_is_no_run_is_named(tmp_path, capsys):
    assert main(["status", str(tmp_path)]) == 2
    assert f"no heartbeats in '{tmp_path}', which is no run's folder" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("")
    assert main(["status", str(tmp_path)]) == 2
    assert "which is no run's folder" not in capsys.readouterr().err

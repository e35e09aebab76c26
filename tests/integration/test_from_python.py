"""Ranks that a launcher starts with a script of the user's own, which trains by `deca_ds.train`."""

from __future__ import annotations

import json

import pytest
from jobs import launch

SCRIPT = "tests/integration/script_worker.py"

pytestmark = pytest.mark.multiprocess


def test_a_script_trains_learns_the_scores_and_goes_on(config, tmp_path):
    finished = launch("hand", 2, [str(config), str(tmp_path)], script=SCRIPT)
    assert finished.code == 0, finished.output[-4000:]
    assert (tmp_path / "run" / "DONE").exists() and not (tmp_path / "again").exists()
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["output"] == second["output"] == str(tmp_path / "run")
    for found in (first, second):
        assert [each["step"] for each in found["evaluations"]] == [0, 6, 12]
        assert found["handlers are as before"] and found["environment is as before"]
        assert "train once in a process" in found["again"]
    ends = [found["evaluations"][-1] for found in (first, second)]
    assert ends[0]["clients"].keys() == {"0", "1"} and ends[0]["mean"] == ends[1]["mean"] != {}
    assert ends[0]["clients"]["0"]["common"] == ends[1]["clients"]["0"]["common"]
    assert first["simulated"] == pytest.approx(first["best"], rel=1e-3)


def test_a_mistake_ends_all_ranks_of_a_script(config, tmp_path):
    config.write_text(config.read_text().replace("lr: 0.003", "lr: -1"))
    finished = launch("hand", 2, [str(config), str(tmp_path)], script=SCRIPT)
    assert "exit codes: [2, 2]" in finished.output and finished.output.count("optimizer.lr = -1") == 1
    assert not list(tmp_path.glob("*.json")) and not (tmp_path / "run").exists()

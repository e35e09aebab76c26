"""The commands that look at files or start others do without torch and what is as slow: they answer at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import deca_ds
from deca_ds.cli import COMMANDS

SCRIPT = """
import json, sys
from deca_ds.cli import main
slow = {"accelerate", "datasets", "deepspeed", "huggingface_hub", "mpi4py", "networkx", "numpy", "torch"}
looks, others, mistakes = map(json.loads, sys.argv[1:])
for command in [*looks, *others, *mistakes]:
    try:
        code = main(command)
    except SystemExit as end:
        code = end.code
    assert code == (2 if command in mistakes else 0), (command, code)
    unwanted = slow | {"omegaconf", "yaml"} if command in looks else slow
    assert not unwanted & sys.modules.keys(), (command, unwanted & sys.modules.keys())
"""


def test_what_looks_at_files_imports_nothing_slow(tmp_path):
    run = tmp_path / "run"
    (run / "heartbeats").mkdir(parents=True)
    (run / "heartbeats" / "rank_0000.json").write_text(
        '{"rank": 0, "host": "n0", "client": 0, "phase": "gossip", "step": 3, "block": "layers 0-1", "awaits": 1,'
        ' "idle_s": 0.5, "time": 1.0}'
    )
    (run / "DONE").write_text("inner steps: 3 of 3\n")
    helps = [[name, "--help"] for name in COMMANDS]
    keys = (f"run.output={run}", "model.path=none", "data.train=[none]", "run.resume=auto", "checkpoint.every=1")
    looks = [["--help"], ["status", str(run)], ["stop", str(run)], ["where"]]
    others = [["supervise", "true", "train.py", *keys], *helps]
    mistakes = [[name, "--config", "none.yaml"] for name in ("plan", "simulate")]
    mistakes += [["data", "none.yaml"], ["export", str(tmp_path / "none"), "out"], ["chat", "./none"]]
    wide = os.environ | {"COLUMNS": "160"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(looks), json.dumps(others), json.dumps(mistakes)],
        capture_output=True,
        text=True,
        timeout=120,
        env=wide,
    )
    assert done.returncode == 0, done.stderr
    assert "gossip, waiting for client 1" in done.stdout and "inner steps: 3 of 3" in done.stdout
    assert "nothing to stop: DONE" in done.stdout
    assert "usage: deca [-h] [--version] COMMAND ...\n" in done.stdout, "its list of commands is no part of the usage"


def test_the_package_imports_what_a_script_asks_for_and_nothing_before():
    """Every name is there; only the one that is asked for is imported."""
    code = (
        "import sys, deca_ds\n"
        "assert not {'torch', 'omegaconf', 'deca_ds.config'} & sys.modules.keys()\n"
        "assert set(deca_ds.__all__) <= set(dir(deca_ds))\n"
        "deca_ds.UserError, deca_ds.load_config\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for name in deca_ds.__all__:
        assert getattr(deca_ds, name).__name__ == name
    with pytest.raises(AttributeError, match="'deca_ds' has no attribute 'simulte'"):
        deca_ds.simulte  # noqa: B018

"""How jobs fail: users' mistakes, ranks that hang, are killed or diverge, and launchers that are killed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess

import psutil
import pytest
from jobs import REPOSITORY, launch, processes_below, ranks_of, steps_done, wait_until

from deca_ds.cli import main
from deca_ds.watchdog.failure import told_exit_codes

pytestmark = pytest.mark.multiprocess
LONG = ["algorithm.inner_steps=100000", "evaluation.every=0", "logging.progress=false"]


@pytest.mark.parametrize(
    ("launcher", "overrides", "message"),
    [
        ("mpirun", ["optimizer.lrr=1"], "did you mean optimizer.lr?"),
        ("hand", ["cluster.transport=mpi"], "--launcher openmpi"),
        ("mpirun", ["cluster.clients=3"], "2 ranks cannot be divided among 3 clients"),
        ("mpirun", ["model.path=/nowhere/model"], "there is no folder '/nowhere/model'"),
        ("mpirun", ["gossip.graph=torus", "cluster.clients=2", "gossip.weights=max_degree", "gossip.matrix=/none.txt"],
         "cannot read the mixing matrix"),
    ],
)  # fmt: skip
def test_a_user_mistake_is_one_message_and_nothing_is_written(config, tmp_path, launcher, overrides, message):
    codes = tmp_path / "codes"
    finished = launch(launcher, 2, ["--config", str(config), *overrides], DECA_EXIT_CODES=str(codes))
    assert finished.code != 0
    assert finished.output.count(message) == 1, finished.output[-3000:]
    assert "Traceback" not in finished.output
    assert not (tmp_path / "run").exists()
    assert told_exit_codes(codes) == {2}


def test_one_client_s_bad_data_ends_the_job_with_file_and_line(config, tmp_path, rows):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "w1 w2", "label": "red"}\n{"text": \n')
    private = ["data.train=[]", "data.common_holdout=0", "data.partition=iid", f"data.per_client=[{rows},{broken}]"]
    private.append("data.label_names={red: red, green: green, blue: blue}")
    finished = launch("mpirun", 2, ["--config", str(config), *private])
    assert finished.code != 0
    assert finished.output.count("broken.jsonl, line 2") == 1, finished.output[-3000:]
    assert "rank 1" in finished.output
    assert not (tmp_path / "run").exists()


def test_incomplete_weights_are_refused(config, tmp_path, tiny_model):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    finished = launch("mpirun", 2, ["--config", str(config), f"model.path={broken}"])
    assert finished.code != 0
    assert finished.output.count("model.layers.1.mlp.up_proj.weight") == 1, finished.output[-3000:]


def test_divergence_names_the_client_and_leaves_a_failed_marker(config, tmp_path):
    overrides = ["optimizer.lr=1e30", "optimizer.warmup_steps=0", "optimizer.clip_norm=0"]
    finished = launch("hand", 2, ["--config", str(config), *overrides])
    assert finished.code != 0
    assert "not finite" in finished.output and "optimizer.lr" in finished.output
    marker = (tmp_path / "run" / "FAILED").read_text()
    assert "not finite" in marker and "rank" in marker
    assert "gradient, step 2, block embeddings" in marker and "no checkpoint had been saved" in marker
    assert not (tmp_path / "run" / "DONE").exists()


def test_a_rank_that_hangs_is_named_with_phase_and_step(config, tmp_path, capsys):
    """One launch: edges.json, heartbeats, `deca status`, and how the others end when one rank has been stopped."""
    run, worker = tmp_path / "run", "tests/integration/late_worker.py"

    def last_steps() -> list[int]:
        return [json.loads(path.read_text())["step"] for path in (run / "heartbeats").glob("rank_*.json")]

    def while_it_hangs(job: subprocess.Popen) -> None:
        wait_until(lambda: len(last_steps()) == 4 and min(last_steps()) >= 3, "in training", process=job)
        assert main(["status", str(run)]) == 0
        table = capsys.readouterr().out
        assert table.count("gossip") + table.count("gradient") >= 4, table
        wait_until((run / "FAILED").exists, "failed", process=job)
        next(rank for rank in ranks_of(job, worker) if rank.environ()["RANK"] == "3").kill()

    arguments = ["--config", str(config), *LONG, "cluster.timeout_s=20"]
    stops = f"3:4:0:{run}/metrics/never"
    finished = launch("hand", 4, arguments, script=worker, during=while_it_hangs, LATE=stops)
    assert finished.code != 0
    assert "slowest of 1 edge: client 0 on" in finished.output
    (edge,) = json.loads((run / "edges.json").read_text())
    assert edge["clients"] == [0, 1] and len(edge["shards"]) == 2
    marker = (run / "FAILED").read_text()
    assert "waits for rank 3 on" in marker and "cluster.timeout_s" in marker, finished.output[-4000:]
    assert "no sign of life for" in marker and ", step " in marker.splitlines()[0]
    assert finished.output.count("no progress for") == 1


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.parametrize("launcher", ["deepspeed", "mpirun"])
def test_a_killed_rank_ends_the_job_and_no_process_stays(config, tmp_path, launcher):
    metrics = tmp_path / "run" / "metrics" / "client_001.jsonl"

    def during(job: subprocess.Popen) -> None:
        wait_until(lambda: steps_done(metrics) >= 3, "in training", process=job)
        ranks = ranks_of(job, "launchers/train.py")
        assert len(ranks) == 2
        ranks[-1].kill()
        wait_until(lambda: job.poll() is not None, "at its end")
        wait_until(lambda: not any(map(is_alive, ranks)), "without processes")

    finished = launch(launcher, 2, ["--config", str(config), *LONG], fresh=launcher == "mpirun", during=during)
    assert finished.code != 0


def test_ranks_end_when_their_launcher_is_killed(config, tmp_path):
    metrics = tmp_path / "run" / "metrics" / "client_000.jsonl"

    def during(job: subprocess.Popen) -> None:
        wait_until(lambda: steps_done(metrics) >= 3, "in training", process=job)
        processes = processes_below(job, lambda command: True)
        (launcher,) = processes_below(job, lambda command: "deepspeed.launcher.launch" in command)
        launcher.kill()
        wait_until(lambda: not any(map(is_alive, processes)), "without processes")

    launch("deepspeed", 2, ["--config", str(config), *LONG, "cluster.clients=1"], fresh=True, during=during)
    assert "launcher is gone" in (tmp_path / "run" / "FAILED").read_text()


# Has a rank that comes to import torch leave a file, and wait until there is one named `go`.
SLOW_IMPORT = """
import os, pathlib, sys, time
class Slow:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torch" and sys.argv[0].endswith("train.py"):
            folder = pathlib.Path(__file__).parent
            (folder / f"imports_{os.getpid()}").touch()
            while not (folder / "go").exists():
                time.sleep(0.05)
sys.meta_path.insert(0, Slow)
"""


@pytest.mark.parametrize("launcher", ["deepspeed", "mpirun"])
def test_ranks_end_when_their_launcher_was_killed_while_they_imported(config, tmp_path, launcher):
    (tmp_path / "sitecustomize.py").write_text(SLOW_IMPORT)

    def during(job: subprocess.Popen) -> None:
        wait_until(lambda: len(list(tmp_path.glob("imports_*"))) == 2, "importing", process=job)
        processes = processes_below(job, lambda command: True)
        (parent,) = {rank.parent() for rank in ranks_of(job, "launchers/train.py")}
        parent.kill()
        (tmp_path / "go").touch()
        wait_until(lambda: not any(map(is_alive, processes)), "without processes")

    path = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    arguments = ["--config", str(config), *LONG, "cluster.clients=1"]
    finished = launch(launcher, 2, arguments, fresh=True, during=during, PYTHONPATH=path)
    if launcher == "deepspeed":  # what mpirun's ranks say ends with mpirun
        assert "launcher is gone" in finished.output, finished.output[-4000:]


def test_a_stop_while_a_model_is_loaded_ends_all_ranks_at_once(config, tmp_path):
    """Rank 1 would never end to load it, and is told; rank 0 waits for it in a library that no signal interrupts."""
    worker, beat = "tests/integration/loading_worker.py", tmp_path / "run" / "heartbeats" / "rank_0001.json"

    def during(job: subprocess.Popen) -> None:
        loads = "loading the model"
        wait_until(lambda: beat.exists() and loads in beat.read_text(), loads, process=job)
        next(rank for rank in ranks_of(job, worker) if rank.environ()["RANK"] == "1").send_signal(signal.SIGTERM)

    arguments = ["--config", str(config), "cluster.timeout_s=600", "cluster.transport=torch"]
    finished = launch("hand", 2, arguments, script=worker, during=during, DECA_TEST_LOADS_S="0")
    assert finished.code == 0 and "exit codes: [0, 0]" in finished.output, finished.output[-4000:]
    assert finished.output.count("nothing was trained") == 1 and "Traceback" not in finished.output
    assert {name for name in ("DONE", "STOPPED", "FAILED") if (tmp_path / "run" / name).exists()} == {"STOPPED"}


def test_a_client_that_loads_for_long_is_waited_for_and_one_that_hangs_there_is_named(config, tmp_path):
    """Rank 1 reads its tokenizer for three times cluster.timeout_s; then it hangs where its model is loaded."""
    arguments = ["--config", str(config), "cluster.timeout_s=8", "cluster.transport=torch"]
    worker = "tests/integration/loading_worker.py"
    finished = launch("hand", 2, arguments, script=worker, DECA_TEST_LOADS_S="24")
    assert finished.code == 1, finished.output[-4000:]
    assert "exit codes: [1, 1]" in finished.output and finished.output.count("ERROR") == 1
    failed = (tmp_path / "run" / "FAILED").read_text()
    assert "rank 1 on " in failed and "loading the model" in failed, "by itself, or by rank 0 that waits for it"

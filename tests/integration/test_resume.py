"""Runs that are killed, told to stop, damaged or moved to another number of ranks, and continue."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Callable
from operator import gt
from pathlib import Path

import pytest
import torch
from jobs import Finished, launch, processes_below, ranks_of, steps_done, wait_until, word_job
from transformers import LlamaConfig, LlamaForCausalLM

from deca_ds.checkpoint.open_steps import find_checkpoint
from deca_ds.checkpoint.shards import ShardedModel
from deca_ds.checkpoint.steps import step_folder, steps_in
from deca_ds.config import load_config
from deca_ds.engine.architecture import find_blocks, load_architecture, meta_model
from deca_ds.tools.disk import Stored, disk_need
from deca_ds.training.chosen_method import build_schedule, rule_of
from deca_ds.training.scores import best_of, evaluations

pytestmark = pytest.mark.multiprocess

CLOCKS = (
    "seconds",
    "tokens_per_second",
    "gossip_wait_seconds",
    "peak_memory_bytes_by_rank",
    "peak_memory_bytes_by_rank_before",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def keys(tiny_model, word_files, folder):
    """Two clients with a file each and a model with dropout, which draws random numbers at every step."""
    model = folder / "model"
    shutil.copytree(tiny_model, model)
    LlamaConfig.from_pretrained(model, attention_dropout=0.1).save_pretrained(model)
    assert LlamaForCausalLM.from_pretrained(model).config.attention_dropout == 0.1

    def make(output: str, **changes: object) -> list[str]:
        every = {
            "run.output": folder / output,
            "cluster.clients": 2,
            "algorithm.rounds": 1,
            "algorithm.inner_steps": 4,
            "evaluation.max_examples": 4,
            **changes,
        }
        return word_job(model, word_files[:2], **every)

    return make


def assert_equal(run: Path, uninterrupted: Path) -> None:
    """The trained models, bit for bit, and everything in the metrics but the time that it took."""
    one, other = ShardedModel(run / "model"), ShardedModel(uninterrupted / "model")
    assert one.names == other.names and one.clients == other.clients
    for name in one.names:
        for client in one.clients:
            assert torch.equal(one.read(name, client), other.read(name, client)), (client, name)
    for file in ("client_000.jsonl", "client_001.jsonl", "job.jsonl"):
        assert records(run / "metrics" / file) == records(uninterrupted / "metrics" / file), file


def records(path: Path) -> list[dict]:
    lines = map(json.loads, path.read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in CLOCKS} for line in lines]


GATED = "tests/integration/gated_worker.py"


def kill_rank_1(launcher: subprocess.Popen) -> None:
    next(p for p in ranks_of(launcher, GATED) if p.environ()["OMPI_COMM_WORLD_RANK"] == "1").kill()


def terminate_launch_process(runner: subprocess.Popen) -> None:
    (process,) = processes_below(runner, lambda command: "deepspeed.launcher.launch" in command)
    process.terminate()


BEST = {"evaluation.every": 8, "checkpoint.best": True}
EARLY = {"optimizer.lr": 0, "evaluation.every": 3, "evaluation.patience": 2}
LONG = {"algorithm.inner_steps": 8, "evaluation.every": 20}
STEPS = 32  # of a long run


@pytest.fixture(scope="module")
def crashed_and_moved(keys, folder):
    """Runs that need no launcher of their own, in one job of two ranks a client and one of one rank a client."""
    # gt-adam has more buffers than moments; with bfloat16 the masters are not the model's values
    half = {"model.dtype": "bfloat16"}
    tracking = {"algorithm.method": "gt-adam", "algorithm.rounds": 2, "evaluation.every": 8, **half}
    runs = [
        {"keys": keys("full", **tracking), "leave_after": None, "keep_masters": True},
        {"keys": keys("cut", **tracking, **{"checkpoint.every": 3}), "leave_after": 22},
        {"keys": keys("cut", **tracking, **{"checkpoint.every": 3, "run.resume": "require"}), "leave_after": None},
        {"keys": keys("moved", **half, **{"checkpoint.every": 3}), "leave_after": 7},
    ]
    work(folder, 4, runs)
    runs = [
        {"keys": keys("moved", **half, **{"run.resume": "require"}), "leave_after": None},
        {"keys": keys("uninterrupted", **LONG), "leave_after": None},
        {"keys": keys("unevaluated"), "leave_after": "evaluation"},
        {"keys": keys("unevaluated", **{"run.resume": "auto"}), "leave_after": "saving"},
        {"keys": keys("unevaluated", **{"run.resume": "auto"}), "leave_after": None},
        {"keys": keys("whole"), "leave_after": None},
        {"keys": keys("long", **BEST, **{"algorithm.rounds": 2}), "leave_after": "done"},
        {"keys": keys("prolonged", **BEST), "leave_after": "done"},
        {"keys": keys("prolonged", **BEST, **{"run.resume": "auto"}), "leave_after": None},
        {"keys": keys("prolonged", **BEST, **{"run.resume": "auto", "algorithm.rounds": 2}), "leave_after": "done"},
        {"keys": keys("early", **EARLY), "leave_after": None},
        {"keys": keys("early", **EARLY, **{"run.resume": "require"}), "leave_after": None},
    ]
    told = work(folder, 2, runs)
    assert told.count("nothing left to do") == 2, "on both ranks, once"
    assert told.count("2 evaluations in a row found no lower loss than the one after step 0") == 4, "and once again"
    return folder


def work(folder: Path, ranks: int, runs: list[dict]) -> str:
    listed = folder / "runs.json"
    listed.write_text(json.dumps(runs))
    finished = launch("mpirun", ranks, [str(listed)], script="tests/integration/resume_worker.py")
    assert finished.code == 0, finished.output[-4000:]
    return finished.output


def test_a_run_left_in_the_middle_of_an_activation_equals_an_uninterrupted_one(crashed_and_moved):
    """It has kept its float32 masters from one activation of a block to the next."""
    assert_equal(crashed_and_moved / "cut", crashed_and_moved / "full")


def test_its_checkpoints_cost_what_was_trained_and_take_the_disk_that_is_planned(crashed_and_moved):
    run = crashed_and_moved / "cut"
    config = load_config(run / "config.yaml", [])
    model = meta_model(config.model, load_architecture(config.model))
    plan, rule = find_blocks(config, model), rule_of(config)
    stored, schedule = Stored.of(model, plan, config.model, rule), build_schedule(config, len(plan.blocks), rounds=2)
    last = 30, 32
    assert tuple(steps_in(run / "checkpoints")) == last
    folders = [run / "model", *(step_folder(run / "checkpoints", step) for step in last)]

    def tensor_bytes(*folders: Path) -> int:
        files = {path.stat().st_ino: path.read_bytes() for folder in folders for path in folder.rglob("*.safetensors")}
        return sum(len(content) - 8 - int.from_bytes(content[:8], "little") for content in files.values())

    one = stored.model + sum(stored.checkpoint(schedule, step) for step in last)
    assert tensor_bytes(*folders) == 2 * one
    assert tensor_bytes(run) <= 2 * disk_need(stored, schedule, config.checkpoint).most
    # what steps 27 to 31 did not train is older than the checkpoint before; what they trained is not
    for rank in range(2):
        parts = [step_folder(run / "checkpoints", step) / f"client_001/rank_{rank:03d}" for step in last]
        before = (parts[0] / "manifest.json").stat().st_mtime_ns
        older = {int(path.name[:3]) for path in parts[1].glob("*.safetensors") if path.stat().st_mtime_ns <= before}
        blocks = range(len(plan.blocks))
        assert older == {*blocks, len(plan.blocks)} - schedule.trained(27, 32)


def test_another_number_of_ranks_continues(crashed_and_moved):
    """The worker has compared what it read with the checkpoint, bit by bit."""
    moved = crashed_and_moved / "moved"
    steps = [(record["kind"], record["step"]) for record in records(moved / "metrics" / "client_001.jsonl")]
    assert steps == [("evaluation", 0), *(("step", step) for step in range(1, 17)), ("evaluation", 16)]
    saved = ShardedModel(moved / "model")
    assert saved.ranks == {0: 1, 1: 1} and all(saved.mean(name).isfinite().all() for name in saved.names)


def test_a_run_that_fails_at_its_last_evaluation_or_in_saving_loses_nothing(crashed_and_moved):
    """No checkpoints were asked for; the third start only evaluates and saves."""
    assert_equal(crashed_and_moved / "unevaluated", crashed_and_moved / "whole")


def test_a_finished_run_that_gets_longer_equals_one_that_had_that_length_from_the_start(crashed_and_moved):
    """Which has dropout. Of all checkpoints the best one is left, in both."""
    run, long = crashed_and_moved / "prolonged", crashed_and_moved / "long"
    assert_equal(run, long)
    assert (run / "DONE").read_text() == "inner steps: 32 of 32\n"
    best = best_of(evaluations(run, 0)).step
    assert steps_in(run / "checkpoints") == steps_in(long / "checkpoints") == [best] and best > 0
    one, other = find_checkpoint(run / "checkpoints", best), find_checkpoint(long / "checkpoints", best)
    assert one.states[0, 0]["best"] == other.states[0, 0]["best"]
    assert all(torch.equal(one.mean(name), other.mean(name)) for name in one.names)
    assert load_config(run / "config.yaml").algorithm.rounds == 2
    assert [start["rounds"] for start in json.loads((run / "starts.json").read_text())] == [1, 2]


def test_a_run_that_learns_nothing_stops_early_on_all_ranks_and_can_continue(crashed_and_moved):
    """Its learning rate is 0."""
    run = crashed_and_moved / "early"
    assert steps_in(run / "checkpoints") == [6]
    for name in ("client_000.jsonl", "client_001.jsonl"):
        assert [r["step"] for r in records(run / "metrics" / name) if r["kind"] == "evaluation"] == [0, 3, 6]


def test_killed_damaged_and_stopped_twice_equals_uninterrupted(keys, crashed_and_moved):
    """Every attempt continues where the previous one stood, in the middle of an activation, also on another launcher
    and transport."""
    run = crashed_and_moved / "run"
    checkpoints, go_on = run / "checkpoints", run.with_name("go_on")
    arguments = keys("run", **LONG, **{"checkpoint.every": 7, "run.resume": "auto"})

    def start(launcher: str, more: int, action: Callable[[subprocess.Popen], None]) -> Finished:
        """Act on the launcher's process when client 1 is so many inner steps further than the attempt before it."""
        metrics = run / "metrics" / "client_001.jsonl"
        step = steps_done(metrics) + more

        def during(process: subprocess.Popen) -> None:
            wait_until(lambda: steps_done(metrics) >= step, f"at step {step}", process=process)
            action(process)

        return launch(launcher, 2, arguments, script=GATED, during=during, GATE=f"{step + 1}:{go_on}")

    killed = start("mpirun", 18, kill_rank_1)
    assert killed.code != 0 and not (run / "STOPPED").exists()
    newest = steps_in(checkpoints)[-1]
    assert newest >= 14

    victim = next(step_folder(checkpoints, newest).rglob("000_*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-1])
    # which tells mpirun by SIGUSR1
    stopped = start("supervised", 2, lambda supervisor: supervisor.send_signal(signal.SIGTERM))
    assert stopped.code == 0, stopped.output[-4000:]
    assert stopped.output.count(f"removed, step {newest}: rank") == 1
    assert f"continuing after inner step {newest - 7} of {STEPS}" in stopped.output
    last = steps_in(checkpoints)[-1]
    assert (
        run / "STOPPED"
    ).read_text() == f"inner steps: {last} of {STEPS}\nto continue: the same command\n" and last >= 20

    stopped = start("deepspeed", 2, terminate_launch_process)
    assert f"continuing after inner step {last} of {STEPS}" in stopped.output, stopped.output[-4000:]
    assert "ERROR" not in stopped.output and not (run / "FAILED").exists()
    assert (run / "STOPPED").read_text().startswith(f"inner steps: {steps_in(checkpoints)[-1]} of {STEPS}\n")
    assert steps_in(checkpoints)[-1] >= last + 2

    def kill_for_once(supervisor: subprocess.Popen) -> None:
        kill_rank_1(supervisor)
        go_on.touch()

    done = start("supervised", 2, kill_for_once)
    assert done.code == 0, done.output[-4000:]
    assert done.output.count("Starting it again") == 1 and done.output.count("continuing after inner step") == 2
    assert (run / "DONE").exists() and not (run / "STOPPED").exists()
    assert_equal(run, crashed_and_moved / "uninterrupted")


def test_a_resume_that_data_or_model_refuse_changes_nothing(tiny_model, word_files, tmp_path):
    """Both are known late. The run has stopped at values that were not finite, which its folder must still tell, or
    has finished, and is to be longer, with another optimizer."""
    run, model = tmp_path / "run", tmp_path / "model"
    shutil.copytree(tiny_model, model)
    files = [Path(shutil.copy(file, tmp_path)) for file in word_files[:2]]
    shape = {"run.output": run, "cluster.clients": 2, "algorithm.rounds": 1, "algorithm.inner_steps": 2}
    done = launch("hand", 2, word_job(model, files, **shape))
    assert done.code == 0 and (run / "DONE").exists(), done.output[-4000:]

    def content() -> dict[str, bytes]:
        return {
            str(path.relative_to(run)): path.read_bytes()
            for path in run.rglob("*")
            if path.is_file() and path.name != "LOCK" and path.parent.name != "heartbeats"
        }

    def beats() -> list[float]:
        return [json.loads(path.read_text())["time"] for path in sorted((run / "heartbeats").glob("rank_*.json"))]

    def refused(message: str, finished: bool) -> None:
        before, last = content(), beats()
        longer = {**shape, "run.resume": "require", "algorithm.rounds": 2, "optimizer.lr": 1e-7}
        if finished:
            del longer["optimizer.lr"]
        again = launch("hand", 2, word_job(model, files, **longer))
        assert again.code != 0 and message in again.output, again.output[-4000:]
        assert content() == before and "removed" not in again.output
        assert all(map(gt, beats(), last)), "from the moment that they had taken the folder, they told what they did"

    rows = files[0].read_text().splitlines(keepends=True)
    files[0].write_text("".join(rows[:-3]))
    refused("client 0 has other data than before", finished=True)
    files[0].write_text("".join(rows))
    config = LlamaConfig.from_pretrained(model)
    config.intermediate_size *= 2
    LlamaForCausalLM(config).save_pretrained(model)
    refused("has shape", finished=True)
    # as if it had diverged after its last checkpoint
    (last,) = {json.loads(path.read_text())["step"] for path in run.glob("model/*/*/manifest.json")}
    (run / "checkpoints").mkdir(exist_ok=True)
    (run / "model").rename(step_folder(run / "checkpoints", last))
    (run / "DONE").unlink()
    (run / "FAILED").write_text("rank 0\nclient 0 has diverged")
    refused("has shape", finished=False)

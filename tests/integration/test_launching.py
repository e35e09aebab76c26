"""Every way to start the job that one machine can run, and the whole line to an exported model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from jobs import launch, run_command
from preloaded import PYTHON
from transformers import AutoModelForCausalLM, AutoTokenizer

from deca_ds.checkpoint.shards import ShardedModel
from deca_ds.cli import main
from deca_ds.tools.report.reading import read_runs
from deca_ds.tools.report.summary import length

pytestmark = pytest.mark.multiprocess


def records(run: Path, name: str, kind: str) -> list[dict]:
    lines = (run / "metrics" / f"{name}.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.mark.parametrize(
    ("launcher", "ranks", "expected"),
    [("deepspeed", 2, "torch"), ("openmpi", 2, "mpi"), ("mpirun", 4, "mpi"), ("python", 1, None)],
)
def test_every_launcher_runs_the_same_job(config, tmp_path, launcher, ranks, expected):
    options = {"hostfile": tmp_path / "hosts"} if launcher == "openmpi" else {}
    overrides = ["cluster.clients=1"] if launcher == "python" else []
    if expected == "mpi":
        overrides.append("cluster.transport=mpi")  # fails where the launcher made no MPI world
    finished = launch(launcher, ranks, ["--config", str(config), *overrides], fresh=launcher != "mpirun", **options)
    assert finished.code == 0, finished.output[-4000:]
    run = tmp_path / "run"
    assert (run / "DONE").exists()
    assert not (run / "checkpoints").exists(), "the one from before the last evaluation is of no more use"
    clients = 1 if launcher == "python" else 2
    assert len(json.loads((run / "data.json").read_text())) == clients
    for client in range(clients):
        steps = records(run, f"client_{client:03d}", "step")
        assert [record["step"] for record in steps] == list(range(1, 13))
        assert all(record["loss"] > 0 and record["tokens_per_second"] > 0 for record in steps)
        assert steps[0]["lr"] == pytest.approx(0.0015) and steps[-1]["lr"] < 1e-4
        evaluations = records(run, f"client_{client:03d}", "evaluation")
        assert [record["step"] for record in evaluations] == [0, 6, 12]
        assert {"accuracy", "macro_f1", "loss"} <= evaluations[0]["common"].keys() & evaluations[0]["own"].keys()
        assert len(evaluations[0]["peak_memory_bytes_by_rank"]) == ranks // clients
    if clients > 1:
        assert re.search(r"^gossip: .* have the same block", finished.output, re.M), "a line of a log stays whole"
        job = records(run, "job", "evaluation")
        assert [record["consensus_distance"] >= 0 for record in job] == [True] * 3
        # after the last averaging over the complete graph of two, both clients are the mean model
        assert job[-1]["mean"]["loss"] == pytest.approx(evaluations[-1]["common"]["loss"], rel=1e-4)
    (read,) = read_runs([run])
    assert not read.notes and read.end == ("DONE", "inner steps: 12 of 12") and length(read) == read.reached == 12
    assert read.starts[0].ranks == (ranks // clients,) * clients and "torch" in read.starts[0].software
    after, last = read.evaluations[clients - 1][-1], evaluations[-1]
    assert after.sent == last["gossip_bytes_sent"] and sum(after.common.confusion.values()) == after.common.examples
    assert len(after.before) == ranks // clients and all(a <= b for a, b in zip(after.before, after.after, strict=True))
    assert len(read.edges) == clients - 1 and read.steps[0][-1].waited >= 0 and len(read.data) == clients


def test_a_run_is_exported_loaded_by_transformers_and_generates(config, tmp_path):
    overrides = ["gossip.graph=isolated", "logging.tensorboard=true", "algorithm.rounds=2", "blocks.order=random"]
    finished = launch("mpirun", 4, ["--config", str(config), *overrides])
    assert finished.code == 0, finished.output[-4000:]
    run = tmp_path / "run"
    assert all(list((run / "tensorboard" / name).glob("events*")) for name in ("client_001", "job"))
    saved = ShardedModel(run / "model")
    exported = run_command([*PYTHON, "launchers/export.py", str(run), str(tmp_path / "mean")])
    assert exported.code == 0, exported.output
    assert main(["export", str(run), str(tmp_path / "client1"), "--client", "1"]) == 0
    for name, expected in (("mean", saved.mean), ("client1", lambda key: saved.read(key, 1))):
        model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not loading["missing_keys"] and not loading["unexpected_keys"]
        for key, parameter in model.named_parameters():
            assert torch.equal(parameter.detach(), expected(key)), key
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "mean")
    prompt = tokenizer("w1 w2 Label:", return_tensors="pt")["input_ids"]
    assert model.generate(input_ids=prompt, max_new_tokens=3, do_sample=False).shape[1] > prompt.shape[1]
    # isolated clients with different data end apart
    assert any(not torch.equal(saved.read(key, 0), saved.read(key, 1)) for key in saved.names)
    assert records(run, "job", "evaluation")[-1]["consensus_distance"] > 0


def test_a_bfloat16_model_with_offloaded_parameters_trains(config, tmp_path):
    overrides = ["model.dtype=bfloat16", "deepspeed=ds_configs/zero3_offload.json", "model.gradient_checkpointing=true"]
    finished = launch("hand", 2, ["--config", str(config), "cluster.clients=1", *overrides])
    assert finished.code == 0, finished.output[-4000:]
    saved = ShardedModel(tmp_path / "run" / "model")
    assert {saved.model_dtype(name) for name in saved.names} == {torch.bfloat16}
    assert all(saved.mean(name).isfinite().all() for name in saved.names)


def test_random_weights_do_not_depend_on_the_number_of_ranks(config, tmp_path):
    for launcher, ranks, clients in (("python", 1, 1), ("mpirun", 4, 2)):
        overrides = ["model.init=random", "optimizer.lr=0", "algorithm.inner_steps=1", f"cluster.clients={clients}"]
        overrides += [f"run.output={tmp_path / launcher}"]
        finished = launch(launcher, ranks, ["--config", str(config), *overrides])
        assert finished.code == 0, finished.output[-4000:]
    alone, four = (ShardedModel(tmp_path / launcher / "model") for launcher in ("python", "mpirun"))
    for name in four.names:
        assert torch.equal(four.read(name, 0), four.read(name, 1)), "clients start from different weights"
        assert torch.equal(alone.read(name, 0), four.read(name, 1))
        if "norm" not in name:
            assert alone.read(name, 0).std() > 0


def test_dry_run_prints_the_plan_and_writes_nothing(config, tmp_path):
    finished = launch("hand", 2, ["--config", str(config), "--dry-run"])
    assert finished.code == 0, finished.output[-3000:]
    for shown in ("embeddings", "layers 0-1", "spectral gap 1", "= 12", "2 ranks = 2 clients x 1 rank", "each client"):
        assert shown in finished.output
    assert not (tmp_path / "run").exists()

"""Every way to start the job that one machine can run, the whole line to an exported model, and how jobs fail."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from jobs import BIN, REPOSITORY, launch, run_command
from preloaded import PYTHON
from transformers import AutoModelForCausalLM, AutoTokenizer

from deca_ds.checkpoint.shards import ShardedModel
from deca_ds.tools.report.reading import read_runs
from deca_ds.tools.report.summary import length

pytestmark = pytest.mark.multiprocess


@pytest.fixture
def rows(tmp_path) -> Path:
    """A labelled data set of three words, each of which decides the label."""
    lines = []
    for i in range(90):
        colour = ("red", "green", "blue")[i % 3]
        lines.append(json.dumps({"text": f"w{i % 3} w{i % 7} w{(i * 5) % 11} w{i % 3}", "label": colour}))
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def config(tiny_model, rows, tmp_path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"""
run: {{output: {tmp_path / "run"}, device: cpu, threads: 1}}
cluster: {{clients: 2, timeout_s: 60}}
model: {{path: {tiny_model}}}
blocks: {{layers_per_block: 2}}
algorithm: {{rounds: 1, inner_steps: 3}}
optimizer: {{lr: 0.003, schedule: cosine, warmup_steps: 2}}
data:
  train: [{rows}]
  format: classification
  partition: dirichlet
  alpha: 0.5
  common_holdout: 0.2
  max_length: 24
  batch_size: 8
  micro_batch_size: 2
evaluation: {{every: 6}}
"""
    )
    return path


def records(run: Path, name: str, kind: str) -> list[dict]:
    lines = (run / "metrics" / f"{name}.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.mark.parametrize(
    ("launcher", "ranks", "expected"),
    [("deepspeed", 4, "torch"), ("openmpi", 2, "mpi"), ("mpirun", 2, "mpi"), ("python", 1, None)],
)
def test_every_launcher_runs_the_same_job(config, tmp_path, launcher, ranks, expected):
    options = {"hostfile": tmp_path / "hosts"} if launcher == "openmpi" else {}
    overrides = ["cluster.clients=1"] if launcher == "python" else []
    if expected == "mpi":
        overrides.append("cluster.transport=mpi")  # fails where the launcher made no MPI world
    finished = launch(launcher, ranks, ["--config", str(config), *overrides], fresh=True, **options)
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
        job = records(run, "job", "evaluation")
        assert [record["consensus_distance"] >= 0 for record in job] == [True] * 3
        # after the last averaging over the complete graph of two, both clients are the mean model
        assert job[-1]["mean"]["loss"] == pytest.approx(evaluations[-1]["common"]["loss"], rel=1e-4)
    (read,) = read_runs([run])
    assert not read.notes and read.end == ("DONE", "12 of 12 inner steps") and length(read) == read.reached == 12
    assert read.starts[0].ranks == (ranks // clients,) * clients and "torch" in read.starts[0].software
    after, last = read.evaluations[clients - 1][-1], evaluations[-1]
    assert after.sent == last["gossip_bytes_sent"] and sum(after.common.confusion.values()) == after.common.examples
    assert len(after.before) == ranks // clients and all(a <= b for a, b in zip(after.before, after.after, strict=True))
    assert len(read.edges) == clients - 1 and read.steps[0][-1].waited >= 0 and len(read.data) == clients


def test_the_whole_line_to_a_generation(config, tmp_path):
    overrides = ["gossip.graph=isolated", "logging.tensorboard=true", "algorithm.rounds=2", "blocks.order=random"]
    finished = launch("mpirun", 4, ["--config", str(config), *overrides])
    assert finished.code == 0, finished.output[-4000:]
    run = tmp_path / "run"
    assert all(list((run / "tensorboard" / name).glob("events*")) for name in ("client_001", "job"))
    saved = ShardedModel(run / "model")
    for name, command, arguments, expected in [
        ("mean", [*PYTHON, "launchers/export.py"], [], saved.mean),
        ("client1", [str(BIN / "deca"), "export"], ["--client", "1"], lambda key: saved.read(key, 1)),
    ]:
        exported = run_command([*command, str(run), str(tmp_path / name), *arguments])
        assert exported.code == 0, exported.output
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


def test_bfloat16_and_parameters_offloaded_to_the_cpu(config, tmp_path):
    overrides = ["model.dtype=bfloat16", "deepspeed=ds_configs/zero3_offload.json", "model.gradient_checkpointing=true"]
    finished = launch("hand", 2, ["--config", str(config), "cluster.clients=1", *overrides])
    assert finished.code == 0, finished.output[-4000:]
    saved = ShardedModel(tmp_path / "run" / "model")
    assert {saved.model_dtype(name) for name in saved.names} == {torch.bfloat16}
    assert all(saved.mean(name).isfinite().all() for name in saved.names)


def test_random_weights_do_not_depend_on_the_number_of_ranks(config, tmp_path):
    for launcher, ranks, clients in (("python", 1, 1), ("mpirun", 4, 2)):
        overrides = ["model.init=random", "optimizer.lr=0", f"cluster.clients={clients}"]
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
    for shown in ("embeddings", "layers 0-1", "spectral gap 1", "= 12", "2 ranks = 2 clients x 1 ranks", "each client"):
        assert shown in finished.output
    assert not (tmp_path / "run").exists()


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
    finished = launch(launcher, 2, ["--config", str(config), *overrides])
    assert finished.code != 0
    assert finished.output.count(message) == 1, finished.output[-3000:]
    assert "Traceback" not in finished.output
    assert not (tmp_path / "run").exists()


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


def test_a_rank_that_hangs_is_named_with_phase_and_step(config, tmp_path):
    """One launch: edges.json, heartbeats, `deca status`, and how the others end when one rank has been stopped."""
    run = tmp_path / "run"
    long = ["--config", str(config), "algorithm.inner_steps=100000", "evaluation.every=0", "logging.progress=false"]

    def hang_rank_3(job: subprocess.Popen) -> None:
        heartbeat, deadline = run / "heartbeats" / "rank_0003.json", time.monotonic() + 150
        while not heartbeat.exists() or json.loads(heartbeat.read_text())["step"] < 3:
            assert time.monotonic() < deadline and job.poll() is None, "no training"
            time.sleep(0.2)
        scripts = [
            p for p in psutil.Process(job.pid).children(recursive=True) if "train.py" in "".join(p.cmdline()[:3])
        ]
        next(p for p in scripts if p.environ().get("LOCAL_RANK") == "3").suspend()
        table = run_command([sys.executable, "-m", "deca_ds.cli", "status", str(run)], deadline_s=60)
        assert table.code == 0 and table.output.count("gossip") + table.output.count("gradient") >= 4, table.output

    finished = launch("deepspeed", 4, [*long, "cluster.timeout_s=40"], during=hang_rank_3)
    assert finished.code != 0
    assert "slowest of 1 edge: client 0 on" in finished.output
    (edge,) = json.loads((run / "edges.json").read_text())
    assert edge["clients"] == [0, 1] and len(edge["shards"]) == 2
    marker = (run / "FAILED").read_text()
    assert "waits for rank 3 on" in marker and "cluster.timeout_s" in marker, finished.output[-4000:]
    assert "no sign of life for" in marker and ", step " in marker.splitlines()[0]
    assert finished.output.count("no progress for") == 1


@pytest.mark.parametrize(("launcher", "count"), [("deepspeed", 4), ("mpirun", 2)])
def test_a_killed_rank_ends_the_job_and_no_process_stays(config, tmp_path, launcher, count):
    long = ["--config", str(config), "algorithm.inner_steps=100000", "evaluation.every=0", "logging.progress=false"]
    start = (
        ["--num_accelerators", str(count), "--master_port", "29653"] if launcher == "deepspeed" else ["-n", str(count)]
    )
    script = [str(REPOSITORY / "launchers/train.py")]
    command = [str(BIN / launcher), *start, *([sys.executable] if launcher == "mpirun" else []), *script, *long]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    log = tmp_path / "log"
    with open(log, "w") as sink:
        job = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
    ranks: list[psutil.Process] = []
    try:
        metrics = tmp_path / "run" / "metrics" / "client_001.jsonl"
        _wait(lambda: metrics.exists() and '"step": 3' in metrics.read_text(), 120, log)
        # python [-u] train.py, not the launcher, which has the script among its later arguments
        ranks = [p for p in psutil.Process(job.pid).children(recursive=True) if script[0] in p.cmdline()[:3]]
        assert len(ranks) == count
        ranks[-1].kill()
        assert job.wait(timeout=60) != 0
        _wait(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in ranks), 30, log)
    finally:
        for process in ranks:
            if process.is_running():
                process.kill()
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()


def test_ranks_end_when_their_launcher_is_killed(config, tmp_path):
    log = tmp_path / "log"
    long = ["--config", str(config), "algorithm.inner_steps=100000", "evaluation.every=0", "cluster.clients=1"]
    command = [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", "29654"]
    with open(log, "w") as sink:
        job = subprocess.Popen(
            [*command, str(REPOSITORY / "launchers/train.py"), *long],
            stdout=sink, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip
    tree: list[psutil.Process] = []
    try:
        metrics = tmp_path / "run" / "metrics" / "client_000.jsonl"
        _wait(lambda: metrics.exists() and '"step": 3' in metrics.read_text(), 120, log)
        tree = psutil.Process(job.pid).children(recursive=True)
        launcher = next(p for p in tree if "deepspeed.launcher.launch" in p.cmdline())
        launcher.kill()
        _wait(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in tree), 60, log)
        assert "launcher is gone" in (tmp_path / "run" / "FAILED").read_text()
    finally:
        for process in tree:
            if process.is_running():
                process.kill()
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()


def _wait(condition, seconds: float, log: Path) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"still waiting after {seconds} s\n{log.read_text()[-4000:]}")
        time.sleep(0.2)


def test_a_client_that_loads_for_long_is_waited_for_and_one_that_hangs_there_is_named(config, tmp_path):
    """Rank 1 reads its tokenizer for three times cluster.timeout_s; then it hangs where its model is loaded."""
    arguments = ["--config", str(config), "cluster.timeout_s=8", "cluster.transport=torch"]
    worker = "tests/integration/loading_worker.py"
    finished = launch("hand", 2, arguments, script=worker, DECA_TEST_LOADS_S="24")
    assert finished.code == 2, finished.output[-4000:]
    assert "exit codes: [2, 2]" in finished.output and finished.output.count("ERROR") == 1
    failed = (tmp_path / "run" / "FAILED").read_text()
    assert "rank 1 on " in failed and "loading the model" in failed, "by itself, or by rank 0 that waits for it"

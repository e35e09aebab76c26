"""Clients that die while the others continue: numbers, records, who speaks for the job, and when it has to stop."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from histories import assert_simulated
from jobs import BIN, REPOSITORY, Finished, free_port, run_command
from preloaded import PYTHON
from safetensors.torch import load_file

from deca_ds.checkpoint.export import export_model
from deca_ds.checkpoint.shards import ShardedModel
from deca_ds.checkpoint.steps import step_folder, steps_in
from deca_ds.config import load_config
from deca_ds.errors import CheckpointError

pytestmark = pytest.mark.multiprocess
MPI = pytest.param("mpi", marks=pytest.mark.skipif(not (BIN / "mpirun").exists(), reason="no mpirun"))


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory, where there is such a place: with short time limits a job must not wait for a busy disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="deca", dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture
def keys(tiny_model, word_files, tmp_path) -> list[str]:
    return [
        *(f"run.output={tmp_path / 'run'}", "run.device=cpu", "cluster.timeout_s=100", "cluster.on_failure=continue"),
        *(f"model.path={tiny_model}", "algorithm.rounds=1", "algorithm.inner_steps=2", "algorithm.eps=1e-2"),
        *("optimizer.lr=0.003", f"data.train=[{','.join(map(str, word_files))}]", "data.max_length=16"),
        *("data.batch_size=4", "data.micro_batch_size=2", "logging.progress=false", "evaluation.max_examples=4"),
        "gossip.chunk_mib=0.002",  # many chunks, of which some have been sent when a client dies
    ]


def run(
    ranks: int,
    deaths: str,
    keys: list[str],
    transport: str = "mpi",
    joins: int = 0,
    late: str = "",
    supervised: int = 0,
) -> Finished:
    """transport: mpi, by mpirun with ULFM; torch: every rank started by itself. joins: ranks that then come back. late,
    supervised: see by_hand.py."""
    tests = REPOSITORY / "tests"
    worker = str(tests / "integration/dying_worker.py")
    start = [str(BIN / "mpirun"), "--with-ft", "ulfm", "-n", str(ranks), *PYTHON, worker]
    if transport == "torch":
        start = [sys.executable, str(tests / "by_hand.py"), str(ranks), str(free_port()), worker]
    return run_command(
        [*start, *keys],
        DECA_TEST_DYING=deaths,
        DECA_TEST_JOIN=str(joins),
        DECA_TEST_SUPERVISED=str(supervised),
        DECA_TEST_DEATHS="0" if joins or late or supervised else "1",
        DECA_TEST_LATE=late,
        DECA_TEST_AWAY_S="2" if joins or late or supervised else "1",  # within few steps it comes back
    )


def assert_numbers(
    run: Path, keys: list[str], deaths: dict[int, int], returns: dict[int, tuple[int, int]] | None = None
) -> None:
    everybody = range(load_config(None, keys).cluster.clients)
    saved = ShardedModel(run / "model", [c for c in everybody if c not in deaths or c in (returns or {})])
    assert_simulated(saved.read, keys, deaths, returns)


def records(path: Path, kind: str) -> list[dict]:
    return [record for record in map(json.loads, path.read_text().splitlines()) if record["kind"] == kind]


def clients_in(run: Path, step: int) -> list[int]:
    return sorted(int(path.name[-3:]) for path in step_folder(run / "checkpoints", step).glob("client_*"))


@pytest.mark.skipif(not (BIN / "mpirun").exists(), reason="no mpirun")
def test_over_mpi_the_others_continue_when_clients_die_and_messages_are_damaged(keys, tmp_path):
    """Clients of different sizes die: one in an evaluation, then, by its second rank during an averaging, the one that
    speaks for the job. Before that a message is damaged."""
    output = tmp_path / "run"
    keys = [*keys, "cluster.clients=4", "cluster.ranks=[2,1,2,1]", "evaluation.every=4"]
    keys += ["checkpoint.every=2", "checkpoint.keep=1"]
    finished = run(6, "5:4:evaluation,1:5:sent,2:2:damaged", keys)
    assert finished.code == 0, finished.output[-4000:]
    assert_numbers(output, keys, {0: 5, 3: 5})
    job = output / "metrics" / "job.jsonl"
    first, second = records(job, "membership")
    assert (first["step"], first["from_step"], first["missing"], first["clients"]) == (4, 5, [3], [0, 1, 2])
    assert (second["step"], second["from_step"], second["missing"], second["clients"]) == (5, 5, [0, 3], [1, 2])
    assert 0 < first["spectral_gap"] <= 1 and second["spectral_gap"] == 1
    assert [record["step"] for record in records(job, "evaluation")] == [0, 4, 8]
    assert finished.output.count("client 3 gone; 3 of 4 continue") == 1, finished.output[-4000:]
    assert finished.output.count("clients 0, 3 gone; 2 of 4 continue") == 1
    assert f"done without clients 0, 3: {output}\n  deca status {output} " in finished.output
    assert "a message from rank 2 (client 1) was damaged on its way: its checksum differs" in finished.output
    for client, steps in ((0, 4), (1, 8), (2, 8), (3, 4)):
        lines = records(output / "metrics" / f"client_{client:03d}.jsonl", "step")
        assert [line["step"] for line in lines] == list(range(1, steps + 1)), "no step is lost or repeated"
    assert (output / "DONE").read_text() == "inner steps: 8 of 8\nmissing clients: 0, 3\n"
    assert not (output / "FAILED").exists() and not (output / "model" / "client_003").exists()
    # beside the last one, the newest that the survivors know all clients to have written stays, for them to resume from
    whole = [step for step in steps_in(output / "checkpoints") if clients_in(output, step) == [0, 1, 2, 3]]
    assert whole and clients_in(output, 8) == [1, 2]
    ShardedModel(step_folder(output / "checkpoints", whole[0])).verify()

    report = export_model(output, tmp_path / "mean")
    assert report.source == "mean of 2 clients (without 0, 3, gone before the end)" and report.note is None
    with pytest.raises(CheckpointError, match="client 3 was gone before the run ended"):
        export_model(output, tmp_path / "client3", client=3)


@pytest.mark.parametrize(
    ("transport", "ranks", "hangs", "deaths", "told"),
    [
        ("torch", [1, 1, 1, 1], "1:3:stopped,0:5:stopped", {1: 3, 0: 5}, "its rank 1 has made no progress"),
        pytest.param("mpi", [1, 1, 1], "1:3:hangs", {1: 3}, "no sign of work", marks=MPI.marks),
    ],
    ids=["a client, and the one with coordinator and store", "a main thread, over MPI"],
)
def test_a_client_that_hangs_is_dropped(keys, tmp_path, transport, ranks, hangs, deaths, told):
    """A main thread that hangs while the process is alive, and processes that are stopped and continue much later."""
    output, clients = tmp_path / "run", len(ranks)
    keys = [key for key in keys if "timeout_s" not in key] + ["cluster.timeout_s=12", f"cluster.clients={clients}"]
    finished = run(sum(ranks), hangs, [*keys, f"cluster.ranks={ranks}"], transport)
    assert finished.code == 0, finished.output[-6000:]
    assert_numbers(output, keys, deaths)
    lost = records(output / "metrics" / "job.jsonl", "membership")
    assert [(record["from_step"], record["missing"]) for record in lost] == [(3, [1]), (5, [0, 1])][: len(deaths)]
    assert (output / "DONE").read_text().endswith(f"missing clients: {', '.join(map(str, sorted(deaths)))}\n")
    assert told in (output / "FAILED_client_001").read_text()
    assert (output / "FAILED_client_000").exists() == (0 in deaths) and not (output / "STOPPED").exists()
    assert not (output / "FAILED").exists()


def test_a_client_comes_back_with_a_neighbours_state(keys, tmp_path):
    """Client 0 of three, two ranks each, which is the coordinator, hosts the store and speaks for the job."""
    output, clients, ranks, dead, step = tmp_path / "run", 3, 2, 0, 4
    keys = [*keys, f"cluster.clients={clients}", "algorithm.rounds=4", "evaluation.every=16", "checkpoint.every=8"]
    finished = run(clients * ranks, f"{ranks * (dead + 1) - 1}:{step}:before", keys, "torch", joins=ranks)
    assert finished.code == 0, finished.output[-6000:]
    lost, back = records(output / "metrics" / "job.jsonl", "membership")
    everybody = list(range(clients))
    assert (lost["from_step"], lost["missing"]) == (step, [dead])
    assert (back["clients"], back["missing"], back["parts"]) == (everybody, [], [everybody])
    assert finished.output.count(f"client {dead} back; {clients} of {clients} continue") == 1
    assert_numbers(output, keys, {dead: step}, {dead: (back["from_step"] - 1, 1)})
    own = records(output / "metrics" / f"client_{dead:03d}.jsonl", "step")
    assert [line["step"] for line in own] == [*range(1, step), *range(back["from_step"], 33)]
    assert (output / "DONE").read_text() == "inner steps: 32 of 32\n" and not list(output.glob("FAILED*"))
    assert export_model(output, tmp_path / "mean").source == f"mean of {clients} clients"
    assert clients_in(output, 32) == everybody
    ShardedModel(step_folder(output / "checkpoints", 32)).verify()


def test_a_client_that_comes_back_has_the_exact_masters_of_a_bfloat16_model(keys, tmp_path):
    """On a complete graph all clients hold the same bits. The first block has been trained when client 1 dies, and is
    not trained again: what it holds of that block in the end is what another one has handed it."""
    output = tmp_path / "run"
    keys = [*keys, "cluster.clients=3", "gossip.graph=complete", "algorithm.rounds=1", "algorithm.inner_steps=16"]
    keys += ["model.dtype=bfloat16", "evaluation.every=0"]
    finished = run(3, "1:18:before", keys, "torch", joins=1)
    assert finished.code == 0, finished.output[-6000:]
    lost, back = records(output / "metrics" / "job.jsonl", "membership")
    assert (lost["missing"], back["missing"]) == ([1], [])
    masters = []
    for client in range(3):
        export_model(output, tmp_path / f"client{client}", client=client, dtype="float32")
        masters.append(load_file(tmp_path / f"client{client}" / "model.safetensors"))
    for name, values in masters[0].items():
        assert all(torch.equal(values, of[name]) for of in masters[1:]), name
    (first,) = [name for name in masters[0] if "embed_tokens" in name]
    assert not torch.equal(masters[1][first], masters[1][first].bfloat16().float()), "rounding would change nothing"


def test_clients_of_different_sizes_die_and_come_back(keys, tmp_path):
    """Client 0, one rank, dies during an averaging and takes the state of client 1, two ranks; then client 1, by one of
    its ranks, dies and takes that of client 2, one rank. Before that a message is damaged. All are supervised."""
    output = tmp_path / "run"
    keys = [*keys, "cluster.clients=3", "cluster.ranks=[1,2,1]", "algorithm.rounds=16", "evaluation.every=64"]
    keys += ["gossip.graph=ring", "gossip.weights=lazy_metropolis"]  # with metropolis, three are one and the same
    keys += ["checkpoint.every=16"]  # the steps outlast two starts of a client
    finished = run(4, "0:4:sent,2:3:returned,3:2:damaged", keys, "torch", supervised=1)
    assert finished.code == 0, finished.output[-6000:]
    assert "a message from rank 3 (client 2) was damaged on its way: its checksum differs" in finished.output
    job = output / "metrics" / "job.jsonl"
    first, back, second, again = records(job, "membership")
    assert [line["missing"] for line in (first, back, second, again)] == [[0], [], [1], []]
    assert [(line["to"], line["by"]) for line in records(job, "handover")] == [(0, 1), (1, 2)]
    assert (first["from_step"], second["from_step"]) == (4, back["from_step"] + 2)
    returns = {0: (back["from_step"] - 1, 1), 1: (again["from_step"] - 1, 2)}
    assert_numbers(output, keys, {0: 4, 1: second["from_step"]}, returns)
    own = records(output / "metrics" / "client_001.jsonl", "step")
    assert [line["step"] for line in own] == [*range(1, second["from_step"]), *range(again["from_step"], 129)]
    assert (output / "DONE").read_text() == "inner steps: 128 of 128\n" and not list(output.glob("FAILED*"))
    assert [record["step"] for record in records(job, "evaluation")] == [0, 64, 128]
    saved = ShardedModel(step_folder(output / "checkpoints", 128))
    saved.verify()
    assert saved.ranks == {0: 1, 1: 2, 2: 1}


def test_a_client_that_was_not_there_at_the_start_comes_later(keys, tmp_path):
    """Client 0 of three, whose first rank would host the store. It has no folder but the addresses."""
    output = tmp_path / "run"
    keys = [*keys, "cluster.clients=3", "algorithm.rounds=4", "evaluation.every=16", "checkpoint.every=8"]
    finished = run(3, "0:0:never", [*keys, "cluster.absent=[0]"], "torch", late=f"0:{output}/metrics/job.jsonl")
    assert finished.code == 0, finished.output[-6000:]
    absent, back = records(output / "metrics" / "job.jsonl", "membership")
    assert (absent["from_step"], absent["missing"], absent["clients"]) == (1, [0], [1, 2])
    assert (back["clients"], back["missing"]) == ([0, 1, 2], [])
    assert finished.output.count("client 0 absent; 2 of 3 continue, spectral gap") == 1
    assert finished.output.count("client 0 back; 3 of 3 continue") == 1
    assert_numbers(output, keys, {0: 1}, {0: (back["from_step"] - 1, 1)})
    own = records(output / "metrics" / "client_000.jsonl", "step")
    assert [line["step"] for line in own] == list(range(back["from_step"], 33))
    assert [summary["client"] for summary in json.loads((output / "data.json").read_text())] == [1, 2]
    assert (output / "DONE").read_text() == "inner steps: 32 of 32\n" and not list(output.glob("FAILED*"))
    assert export_model(output, tmp_path / "mean").source == "mean of 3 clients"


def test_a_client_that_is_still_loading_when_the_others_finish_does_not_fail(keys, tmp_path, monkeypatch):
    """It has been invited, for which the others wait before they train, and comes to learn of the end from its
    connections to the job. Their first record, of who is absent, is written when they let others in."""
    output = tmp_path / "run"
    monkeypatch.setenv("DECA_TEST_LOADS", f"{tmp_path / 'loads'}:{output / 'DONE'}")
    keys = [*keys, "cluster.clients=3", "gossip.graph=complete", "cluster.absent=[2]"]
    finished = run(3, "0:0:never", keys, "torch", late=f"2:{output}/metrics/job.jsonl")
    assert finished.code == 0, finished.output[-6000:]
    assert (tmp_path / "loads").exists()
    told = f"nothing left to join: the job has finished without client 2, {output} is DONE\n"
    assert told in finished.output and "ERROR" not in finished.output
    assert (output / "DONE").read_text() == "inner steps: 8 of 8\nmissing clients: 2\n"
    assert not list(output.glob("FAILED*"))


def test_a_graph_that_falls_apart_stops_the_job_and_the_parts_can_be_resumed(keys, tmp_path):
    """The centre of a star, which also speaks for the job, diverges: its values reach nobody, and it ends alone."""
    output = tmp_path / "run"
    keys = [*keys, "cluster.clients=3", "gossip.graph=star", "evaluation.mean_model=false"]
    keys += ["checkpoint.every=2", "checkpoint.keep=1"]
    finished = run(3, "0:6:nan", keys, "torch")
    assert finished.code == 0, finished.output[-4000:]
    assert "[1] and [2] do not reach each other any more: stopping" in finished.output
    told = (output / "FAILED_client_000").read_text()
    assert "client 0 has diverged: the loss is not finite (nan)" in told and "inner step 6, block " in told
    assert "rank 0\n" in told and "run.resume=require continues after inner step" in told
    assert finished.output.count("client 0 has diverged") == 1 and "client 0 ends" in finished.output
    stopped, _, how = (output / "STOPPED").read_text().partition("to continue: ")
    assert stopped == "inner steps: 6 of 8\nmissing clients: 0\n"
    assert how.startswith("the same command with run.resume=require, from the newest checkpoint that all clients wrote")
    assert not (output / "FAILED").exists() and clients_in(output, 4) == [0, 1, 2] and clients_in(output, 6) == [1, 2]
    assert "from here, without them: cluster.absent=[0]" in finished.output

    without = [*keys, "run.resume=require", "cluster.absent=[0]", "cluster.on_partition=continue"]
    resumed = run(3, "0:0:never", without, "torch", late=f"0:{tmp_path}/never")
    assert resumed.code == 0, resumed.output[-4000:]
    assert "[1] and [2] do not reach each other any more: each part continues by itself" in resumed.output
    assert "continuing after inner step 6 of 8" in resumed.output
    assert (output / "DONE").read_text() == "inner steps: 8 of 8\nmissing clients: 0\n"
    assert not (output / "STOPPED").exists()
    assert_numbers(output, keys, {0: 6})


def test_the_rest_stop_early_together(keys, tmp_path):
    """With a learning rate of 0 no evaluation is better than the first. Client 1 of three dies between two of them, and
    has examples that nobody else is scored on, so that the first evaluation without it begins the search anew."""
    output = tmp_path / "run"
    early = ["optimizer.lr=0", "evaluation.every=2", "evaluation.patience=2", "checkpoint.best=true"]
    keys = [*keys, "cluster.clients=3", "algorithm.rounds=2", *early]
    finished = run(3, "1:3:before", keys, "torch")
    assert finished.code == 0, finished.output[-6000:]
    job = output / "metrics" / "job.jsonl"
    (lost,) = records(job, "membership")
    assert (lost["from_step"], lost["missing"]) == (3, [1])
    assert [record["step"] for record in records(job, "evaluation")] == [0, 2, 4, 6, 8]
    for client in (0, 2):
        lines = records(output / "metrics" / f"client_{client:03d}.jsonl", "step")
        assert [line["step"] for line in lines] == list(range(1, 9))
    why = "2 evaluations in a row found no lower loss than the one after step 4"
    stopped, _, how = (output / "STOPPED").read_text().partition("to continue: ")
    assert stopped == f"inner steps: 8 of 16\nbecause: {why}\nmissing clients: 1\n"
    assert how.startswith("the same command with run.resume=require and evaluation.patience=0, from the newest")
    assert f"deca export {output} MODEL --checkpoint best" in finished.output
    assert not (output / "FAILED").exists()
    best, newest = steps_in(output / "checkpoints")
    assert (best, newest) == (4, 8) and clients_in(output, 4) == clients_in(output, 8) == [0, 2]
    ShardedModel(step_folder(output / "checkpoints", best), [0, 2]).verify()

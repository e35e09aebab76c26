"""Clients on hosts of their own, as network namespaces, whose network falls apart while all processes live."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from histories import assert_simulated
from hosts import Hosts, may_make_hosts
from jobs import REPOSITORY

from deca_ds.checkpoint.shards import ShardedModel

pytestmark = pytest.mark.multiprocess

WORKER = str(REPOSITORY / "tests/integration/dying_worker.py")
STEPS = 128


class Started(Hosts):
    """Hosts and what runs on them."""

    def __init__(self, n: int):
        super().__init__(n)
        self.started: list[subprocess.Popen] = []

    def start(self, i: int, folder: Path, *arguments: str) -> subprocess.Popen:
        output = f"run.output={folder / f'run{i}'}"
        with open(folder / "log", "a") as sink:
            process = subprocess.Popen(
                self.command(i, sys.executable, WORKER, output, *arguments), cwd=REPOSITORY,
                env=self.environment(i) | {"DECA_TEST_DYING": "0:0:never"}, stdout=sink, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.started.append(process)
        return process

    def clean_up(self) -> None:
        for process in self.started:
            process.kill()
            process.wait()
        super().clean_up()


@pytest.fixture
def hosts() -> Iterator[Started]:
    if not may_make_hosts():
        pytest.skip("takes root and network namespaces")
    made = Started(3)
    try:
        made.set_up()
        yield made
    finally:
        made.clean_up()


def wait(until: Callable[[], bool], what: str, log: Path, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        if time.monotonic() > deadline:
            pytest.fail(f"not {what} within {seconds} s\n{log.read_text()[-5000:]}")
        time.sleep(0.2)


def step(folder: Path, client: int) -> int:
    path, last = folder / f"run{client}" / "metrics" / f"client_{client:03d}.jsonl", 0
    with contextlib.suppress(OSError, ValueError, IndexError):
        last = json.loads(path.read_text().splitlines()[-1])["step"]
    return last


@pytest.mark.timeout(700)
def test_a_network_falls_apart_and_its_smaller_part_comes_back(tiny_model, word_files, tmp_path, hosts):
    """Host 0 has the coordinator and the job's store. Every host has a disk of its own, as far as the run knows."""
    apart = 0
    log = tmp_path / "log"
    shared = common_keys(tiny_model, word_files)
    keys = [*shared, "cluster.timeout_s=120", "cluster.min_clients=1", "checkpoint.every=8"]
    processes = [hosts.start(i, tmp_path, *keys) for i in range(3)]
    wait(lambda: step(tmp_path, 1) >= 10, "in training", log)
    hosts.set_apart(apart, True)
    split_at = step(tmp_path, 1)
    for i in (apart, 1):  # both parts go on
        wait(lambda i=i: step(tmp_path, i) > split_at + 3, f"going on with client {i}", log)
    hosts.set_apart(apart, False)
    wait(lambda: all(process.poll() is not None for process in processes), "done", log, 400)
    said = log.read_text()
    assert [process.returncode for process in processes] == [0, 0, 0], said[-5000:]
    assert "clients 1, 2 gone; 1 of 3 go on" in said and "client 0 gone; 2 of 3 go on" in said
    assert "the larger part of the network is in reach again: client 0 will join it" in said
    jobs = [tmp_path / f"run{i}" / "metrics" / "job.jsonl" for i in range(3)]
    lost, back = (line for line in lines(jobs[1]) if line["kind"] == "membership")
    assert (lost["missing"], back["missing"]) == ([apart], [])
    assert [line["missing"] for line in lines(jobs[apart]) if line["kind"] == "membership"] == [[1, 2]]
    assert (tmp_path / "run1" / "DONE").read_text() == f"{STEPS} of {STEPS} inner steps\n"
    assert not list(tmp_path.glob("run*/STOPPED")) and not list(tmp_path.glob("run*/FAILED*"))

    # what client 0 trained by itself is gone, from its model, its metrics and its checkpoints
    saved = [ShardedModel(tmp_path / f"run{client}" / "model", [client]) for client in range(3)]
    read = lambda name, client: saved[client].read(name, client)  # noqa: E731
    assert_simulated(read, keys, {apart: lost["from_step"]}, {apart: (back["from_step"] - 1, 1)})
    own = [line["step"] for line in lines(jobs[apart].with_name("client_000.jsonl")) if line["kind"] == "step"]
    alone = own.index(back["from_step"])
    assert own == sorted(own) and own[alone:] == list(range(back["from_step"], STEPS + 1))


@pytest.mark.timeout(700)
def test_of_two_clients_that_do_not_reach_each_other_one_leaves_and_comes_back(tiny_model, word_files, tmp_path, hosts):
    """Both reach host 0, which has the coordinator: nobody is lost, but they can average no more."""
    log = tmp_path / "log"
    keys = [*common_keys(tiny_model, word_files), "cluster.timeout_s=20", "cluster.min_clients=2"]
    processes = [hosts.start(i, tmp_path, *keys) for i in range(3)]
    wait(lambda: step(tmp_path, 1) >= 10, "in training", log)
    hosts.part(1, 2, True)
    split_at = step(tmp_path, 0)
    wait(lambda: step(tmp_path, 0) > split_at + 3, "going on", log)
    assert "client 1 is out of reach" not in log.read_text(), "it is still trying"
    hosts.part(1, 2, False)
    wait(lambda: all(process.poll() is not None for process in processes), "done", log, 400)
    said = log.read_text()
    assert [process.returncode for process in processes] == [0, 0, 0], said[-5000:]
    assert "client 2 and client 1 cannot reach each other" in said and "client 2 gone; 2 of 3 go on" in said
    records = lines(tmp_path / "run0" / "metrics" / "job.jsonl")
    lost, back = (line for line in records if line["kind"] == "membership")
    assert (lost["missing"], back["missing"]) == ([2], [])
    by = next(line["by"] for line in records if line["kind"] == "handover")
    saved = [ShardedModel(tmp_path / f"run{client}" / "model", [client]) for client in range(3)]
    read = lambda name, client: saved[client].read(name, client)  # noqa: E731
    assert_simulated(read, keys, {2: lost["from_step"]}, {2: (back["from_step"] - 1, by)})


def common_keys(model: Path, files: list[Path]) -> list[str]:
    return [
        *("run.device=cpu", "run.threads=1", "cluster.clients=3", "cluster.on_failure=continue"),
        *("cluster.return_s=300", f"model.path={model}", "algorithm.rounds=16"),
        *("algorithm.inner_steps=2", "algorithm.eps=1e-2", "optimizer.lr=0.003", "gossip.weights=lazy_metropolis"),
        *(f"data.train=[{','.join(map(str, files))}]", "data.max_length=16", "data.batch_size=4"),
        *("data.micro_batch_size=4", "logging.progress=false", "evaluation.max_examples=4", "evaluation.every=0"),
    ]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]

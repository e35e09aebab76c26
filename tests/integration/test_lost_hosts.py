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
STEPS = 192


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


@pytest.mark.timeout(900)
def test_a_network_falls_apart_and_comes_together(tiny_model, word_files, tmp_path, hosts):
    """First hosts 1 and 2 do not reach each other, though both reach host 0, which has the coordinator: nobody is lost,
    but they can average no more, and one of them leaves and comes back. Then host 0, with the coordinator and the job's
    store, is cut off, and its client comes back. Every host has a disk of its own, as far as the run knows."""
    log = tmp_path / "log"
    keys = [
        *("run.device=cpu", "run.threads=1", "cluster.clients=3", "cluster.on_failure=continue"),
        *("cluster.return_s=300", "cluster.timeout_s=40", "cluster.min_clients=1", "checkpoint.every=8"),
        *(f"model.path={tiny_model}", f"algorithm.rounds={STEPS // 8}"),
        *("algorithm.inner_steps=2", "algorithm.eps=1e-2", "optimizer.lr=0.003", "gossip.weights=lazy_metropolis"),
        *(f"data.train=[{','.join(map(str, word_files))}]", "data.max_length=16", "data.batch_size=4"),
        *("data.micro_batch_size=4", "logging.progress=false", "evaluation.max_examples=4", "evaluation.every=0"),
    ]
    processes = [hosts.start(i, tmp_path, *keys) for i in range(3)]
    wait(lambda: step(tmp_path, 1) >= 10, "in training", log)
    hosts.part(1, 2, True)
    split_at = step(tmp_path, 1)
    wait(lambda: step(tmp_path, 1) > split_at + 3, "going on", log, 300)
    assert "client 1 is out of reach" not in log.read_text(), "client 2 is still trying"
    hosts.part(1, 2, False)
    wait(lambda: "client 2 back; 3 of 3 go on" in log.read_text(), "together again", log, 300)
    wait(lambda: step(tmp_path, 2) > split_at + 3, "going on together", log)

    hosts.set_apart(0, True)
    split_at = step(tmp_path, 1)
    for i in (0, 1):  # both parts go on
        wait(lambda i=i: step(tmp_path, i) > split_at + 3, f"going on with client {i}", log)
    hosts.set_apart(0, False)
    wait(lambda: all(process.poll() is not None for process in processes), "done", log, 400)

    said = log.read_text()
    assert [process.returncode for process in processes] == [0, 0, 0], said[-5000:]
    assert "clients 1, 2 gone; 1 of 3 go on" in said and "client 0 gone; 2 of 3 go on" in said
    assert "the larger part of the network is in reach again: client 0 will join it" in said
    jobs = [tmp_path / f"run{i}" / "metrics" / "job.jsonl" for i in range(2)]
    memberships = [[line for line in lines(job) if line["kind"] == "membership"] for job in jobs]
    apart, again = memberships[0][:2]
    assert (apart["missing"], again["missing"]) == ([2], [])
    lost, back = memberships[1][-2:]
    assert (lost["missing"], back["missing"]) == ([0], [])
    assert memberships[0][2]["missing"] == [1, 2]
    assert (tmp_path / "run1" / "DONE").read_text() == f"{STEPS} of {STEPS} inner steps\n"
    assert not list(tmp_path.glob("run*/STOPPED")) and not list(tmp_path.glob("run*/FAILED*"))

    assert "client 2 and client 1 cannot reach each other" in said and "client 2 gone; 2 of 3 go on" in said
    handovers = {line["to"]: line["by"] for job in jobs for line in lines(job) if line["kind"] == "handover"}

    # what client 0 trained by itself is gone, from its model, its metrics and its checkpoints
    saved = [ShardedModel(tmp_path / f"run{client}" / "model", [client]) for client in range(3)]
    read = lambda name, client: saved[client].read(name, client)  # noqa: E731
    deaths = {0: lost["from_step"], 2: apart["from_step"]}
    returns = {0: (back["from_step"] - 1, handovers[0]), 2: (again["from_step"] - 1, handovers[2])}
    assert_simulated(read, keys, deaths, returns)
    own = [line["step"] for line in lines(jobs[0].with_name("client_000.jsonl")) if line["kind"] == "step"]
    alone = own.index(back["from_step"])
    assert own == sorted(own) and own[alone:] == list(range(back["from_step"], STEPS + 1))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]

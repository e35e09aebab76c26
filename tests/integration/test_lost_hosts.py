"""Clients on hosts of their own, as network namespaces, whose network falls apart while all processes live."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from histories import assert_simulated
from hosts import Hosts, may_make_hosts
from jobs import REPOSITORY, preloaded_server, steps_done, wait_until, whole_lines
from preloaded import ADDRESS, PYTHON

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
        dying = {"DECA_TEST_DYING": "0:0:never", "DECA_TEST_AWAY_S": "2"}
        environment = self.environment(i) | {ADDRESS: preloaded_server().address} | dying
        command = self.command(i, *PYTHON, WORKER, output, *arguments)
        with open(folder / "log", "a") as sink:
            process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=sink, stderr=subprocess.STDOUT)
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


@pytest.mark.timeout(1500)
def test_a_network_falls_apart_and_comes_together(tiny_model, word_files, tmp_path, hosts):
    """First hosts 1 and 2 do not reach each other, though both reach host 0, which has the coordinator: nobody is lost,
    but they can average no more, and one of them leaves and comes back. Then host 0, with the coordinator and the job's
    store, is cut off, and its client comes back. Every host has a disk of its own, as far as the run knows."""
    log = tmp_path / "log"
    metrics = [tmp_path / f"run{i}" / "metrics" / f"client_{i:03d}.jsonl" for i in range(3)]
    keys = [
        *("run.device=cpu", "run.threads=1", "cluster.clients=3", "cluster.on_failure=continue"),
        *("cluster.return_s=300", "cluster.timeout_s=24", "cluster.min_clients=1", "checkpoint.every=8"),
        *(f"model.path={tiny_model}", f"algorithm.rounds={STEPS // 8}"),
        *("algorithm.inner_steps=2", "algorithm.eps=1e-2", "optimizer.lr=0.003"),
        *("gossip.graph=ring", "gossip.weights=lazy_metropolis"),
        *(f"data.train=[{','.join(map(str, word_files))}]", "data.max_length=16", "data.batch_size=4"),
        *("data.micro_batch_size=4", "logging.progress=false", "evaluation.max_examples=4", "evaluation.every=0"),
    ]
    processes = [hosts.start(i, tmp_path, *keys) for i in range(3)]

    def wait(condition: Callable[[], object], what: str) -> None:
        wait_until(condition, what, seconds=400, log=log)

    def wait_for_steps(client: int, since: int, what: str) -> None:
        wait(lambda: steps_done(metrics[client]) > since + 3, f"training {what}")

    wait(lambda: steps_done(metrics[1]) >= 10, "in training")
    hosts.part(1, 2, True)
    wait_for_steps(1, steps_done(metrics[1]), "without client 2")
    assert "client 1 is out of reach" not in log.read_text(), "client 2 is still trying"
    hosts.part(1, 2, False)
    wait(lambda: "client 2 back; 3 of 3 continue" in log.read_text(), "together again")
    wait_for_steps(2, steps_done(metrics[1]), "together")

    hosts.set_apart(0, True)
    split_at = steps_done(metrics[1])
    for client in (0, 1):  # both parts continue
        wait_for_steps(client, split_at, f"with client {client}")
    hosts.set_apart(0, False)
    wait(lambda: all(process.poll() is not None for process in processes), "done")

    said = log.read_text()
    assert [process.returncode for process in processes] == [0, 0, 0], said[-5000:]
    assert "clients 1, 2 gone; 1 of 3 continue" in said and "client 0 gone; 2 of 3 continue" in said
    assert "the larger part of the network is in reach again: client 0 will rejoin it" in said
    jobs = [tmp_path / f"run{i}" / "metrics" / "job.jsonl" for i in range(2)]
    memberships = [[line for line in whole_lines(job) if line["kind"] == "membership"] for job in jobs]
    apart, again = memberships[0][:2]
    assert (apart["missing"], again["missing"]) == ([2], [])
    lost, back = memberships[1][-2:]
    assert (lost["missing"], back["missing"]) == ([0], [])
    assert memberships[0][2]["missing"] == [1, 2]
    assert (tmp_path / "run1" / "DONE").read_text() == f"inner steps: {STEPS} of {STEPS}\n"
    assert not list(tmp_path.glob("run*/STOPPED")) and not list(tmp_path.glob("run*/FAILED*"))

    assert "client 2 and client 1 cannot reach each other" in said and "client 2 gone; 2 of 3 continue" in said
    handovers = {line["to"]: line["by"] for job in jobs for line in whole_lines(job) if line["kind"] == "handover"}

    # what client 0 trained by itself is gone, from its model, its metrics and its checkpoints
    saved = [ShardedModel(tmp_path / f"run{client}" / "model", [client]) for client in range(3)]
    read = lambda name, client: saved[client].read(name, client)  # noqa: E731
    deaths = {0: lost["from_step"], 2: apart["from_step"]}
    returns = {0: (back["from_step"] - 1, handovers[0]), 2: (again["from_step"] - 1, handovers[2])}
    assert_simulated(read, keys, deaths, returns)
    own = [line["step"] for line in whole_lines(metrics[0]) if line["kind"] == "step"]
    alone = own.index(back["from_step"])
    assert own == sorted(own) and own[alone:] == list(range(back["from_step"], STEPS + 1))

"""Clients on hosts of their own, as network namespaces, of which one is cut off while its processes live."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from jobs import REPOSITORY

pytestmark = pytest.mark.multiprocess

WORKER = str(REPOSITORY / "tests/integration/dying_worker.py")
STEPS = 128


def ip(*command: str) -> None:
    subprocess.run(["ip", *command], check=True, capture_output=True, timeout=20)


def may_make_hosts() -> bool:
    if os.geteuid() != 0:
        return False
    name = f"deca{os.getpid()}probe"
    try:
        ip("netns", "add", name)
        ip("netns", "del", name)
    except (OSError, subprocess.SubprocessError):
        return False
    return True


class Hosts:
    """n network namespaces on one bridge, in a namespace of its own; host i has the address 10.77.0.(i+1)."""

    def __init__(self, n: int):
        self.prefix = f"deca{os.getpid()}"
        self.names = [f"{self.prefix}h{i}" for i in range(n)]
        self.switch = f"{self.prefix}s"
        self.started: list[subprocess.Popen] = []

    def set_up(self) -> None:
        for name in (self.switch, *self.names):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", self.switch, "link", "set", "bridge", "up")
        for i, name in enumerate(self.names):
            ip("-n", name, "link", "add", "lan", "type", "veth", "peer", "name", f"port{i}", "netns", self.switch)
            ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", "lan")
            ip("-n", name, "link", "set", "lan", "up")
            ip("-n", self.switch, "link", "set", f"port{i}", "master", "bridge")
            ip("-n", self.switch, "link", "set", f"port{i}", "up")

    def link(self, i: int, state: str) -> None:
        """state: up or down."""
        ip("-n", self.switch, "link", "set", f"port{i}", state)

    def start(self, i: int, folder: Path, *arguments: str) -> subprocess.Popen:
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("OMPI_", "PMIX_", "PRTE_"))},
            **{"RANK": str(i), "WORLD_SIZE": str(len(self.names)), "LOCAL_RANK": "0", "LOCAL_SIZE": "1"},
            **{"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29511", "GLOO_SOCKET_IFNAME": "lan"},
            **{"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        }
        output = f"run.output={folder / f'run{i}'}"
        with open(folder / "log", "a") as sink:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.names[i], sys.executable, WORKER, "0:0:never", output, *arguments],
                cwd=REPOSITORY, env=environment, stdout=sink, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.started.append(process)
        return process

    def clean_up(self) -> None:
        for process in self.started:
            process.kill()
            process.wait()
        for name in (self.switch, *self.names):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=20)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if not may_make_hosts():
        pytest.skip("takes root and network namespaces")
    made = Hosts(3)
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
def test_the_others_go_on_without_a_host_that_is_cut_off_and_it_comes_back(tiny_model, word_files, tmp_path, hosts):
    """Host 0 has the coordinator and the job's store. Every host has a disk of its own, as far as the run knows."""
    cut = 0
    log = tmp_path / "log"
    keys = [
        *("run.device=cpu", "run.threads=1", "cluster.clients=3", "cluster.timeout_s=120"),
        *("cluster.on_failure=continue", f"model.path={tiny_model}", "algorithm.rounds=16", "algorithm.inner_steps=2"),
        *(f"data.train=[{','.join(map(str, word_files))}]", "data.max_length=16", "data.batch_size=4"),
        *("data.micro_batch_size=4", "logging.progress=false", "evaluation.max_examples=4", "evaluation.every=0"),
    ]
    processes = [hosts.start(i, tmp_path, *keys) for i in range(3)]
    others = [i for i in range(3) if i != cut]
    wait(lambda: step(tmp_path, 1) >= 10, "in training", log)
    hosts.link(cut, "down")
    lost_at = step(tmp_path, others[0])
    wait(lambda: processes[cut].poll() is not None, "ended on the host that is cut off", log)
    wait(lambda: step(tmp_path, others[0]) > lost_at + 2, "going on", log)
    assert all(processes[i].poll() is None for i in others), log.read_text()[-5000:]
    hosts.link(cut, "up")
    processes[cut] = hosts.start(cut, tmp_path, *keys, "--join")
    wait(lambda: all(process.poll() is not None for process in processes), "done", log, 400)
    assert [process.returncode for process in processes] == [0, 0, 0], log.read_text()[-5000:]
    run = tmp_path / f"run{others[0]}"  # of the first client that was never lost
    members = [json.loads(line) for line in (run / "metrics" / "job.jsonl").read_text().splitlines()]
    assert [line["missing"] for line in members if line["kind"] == "membership"] == [[cut], []]
    assert (run / "DONE").read_text() == f"{STEPS} of {STEPS} inner steps\n"

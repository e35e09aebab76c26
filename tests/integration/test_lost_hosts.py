"""Clients on hosts of their own, as network namespaces, of which one is cut off while its processes live."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hosts import Hosts, may_make_hosts
from jobs import REPOSITORY

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
                self.command(i, sys.executable, WORKER, "0:0:never", output, *arguments),
                cwd=REPOSITORY, env=self.environment(i), stdout=sink, stderr=subprocess.STDOUT,
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

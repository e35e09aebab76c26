"""Jobs on several hosts as a user starts them: `deepspeed --hostfile` over pdsh and over mpirun, with real ssh. Each
host has its own disk and its own processes (tests/cluster.py)."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cluster import Cluster, lacking
from jobs import steps_done, wait_until, word_job

from deca_ds.cli import main

pytestmark = pytest.mark.multiprocess
HEALTHY = ("n0", "n1", "n2")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, tiny_model, word_files) -> Iterator[Cluster]:
    """Three hosts, each with its copy of the model and the data, and three that cannot be used."""
    if why := lacking():
        pytest.skip(why)
    names = (*HEALTHY, "locked", "bare", "down")
    made = Cluster(
        tmp_path_factory.mktemp("cluster"), names, strangers=("locked",), without_python=("bare",), down=("down",)
    )
    try:
        made.set_up()
        for name in HEALTHY:
            shutil.copytree(tiny_model, made.of(name) / "model")
            for i, file in enumerate(word_files):
                shutil.copy(file, made.of(name) / f"words{i}.jsonl")
        yield made
    finally:
        made.clean_up()


@pytest.fixture(autouse=True)
def nothing_left(cluster) -> Iterator[None]:
    """After a test that has failed, its job does not stand in the way of the next one."""
    yield
    cluster.end_all()


def job(cluster: Cluster, name: str, hosts: dict[str, int], *options: str, **keys: object) -> tuple[list[str], Path]:
    """What is typed on the first host, and run.output. hosts: with the slots of each."""
    hostfile, output = cluster.of(next(iter(hosts))) / f"{name}.hosts", cluster.disk / name
    hostfile.write_text("".join(f"{host} slots={slots}\n" for host, slots in hosts.items()))
    start = ["deepspeed", "--quiet", "--hostfile", str(cluster.disk / hostfile.name), *options]
    if "openmpi" not in options:
        start += ["--", "--quiet"]  # to the launcher of each host
    sizes = keys.pop("sizes")
    files = [cluster.disk / f"words{i}.jsonl" for i in range(len(sizes))]
    keys = {
        "run.output": output,
        "cluster.clients": len(sizes),
        "cluster.ranks": f"[{','.join(map(str, sizes))}]",
        "algorithm.rounds": 1,
        "algorithm.inner_steps": 2,
        "evaluation.every": 0,
        **keys,
    }
    return [*start, "launchers/train.py", *word_job(cluster.disk / "model", files, **keys)], output


def in_training(cluster: Cluster, host: str, output: Path, client: int) -> Callable[[subprocess.Popen], None]:
    """Waits until that client, whose first rank is on that host, has made three steps."""

    metrics = cluster.of(host) / output.name / "metrics" / f"client_{client:03d}.jsonl"
    return lambda process: wait_until(lambda: steps_done(metrics) >= 3, "in training", process=process)


def test_pdsh_clients_share_a_host_or_span_two_and_are_exported_once_their_files_are_together(cluster, capsys):
    command, output = job(cluster, "whole", {"n0": 2, "n1": 1, "n2": 1}, sizes=(1, 1, 2))
    (cluster.of("n0") / ".deepspeed_env").write_text("DS_ACCELERATOR=cpu\n")
    finished = cluster.run("n0", command, DS_ACCELERATOR="cpu")
    assert finished.code == 0, finished.output[-4000:]
    noise = [line for line in finished.output.splitlines() if re.search(r"\[(INFO|WARNING)\]|\[W\d", line)]
    assert not noise, "of deepspeed, its launchers and torch"
    ranks = {
        name: sorted(
            (each.parent.name, each.name) for each in (cluster.of(name) / output.name / "model").glob("*/rank_*")
        )
        for name in HEALTHY
    }
    assert ranks == {
        "n0": [("client_000", "rank_000"), ("client_001", "rank_000")],
        "n1": [("client_002", "rank_000")],
        "n2": [("client_002", "rank_001")],
    }
    edges = json.loads((cluster.of("n0") / output.name / "edges.json").read_text())
    assert [edge["clients"] for edge in edges] == [[0, 1], [0, 2], [1, 2]]
    run, mean = cluster.of("n0") / output.name, cluster.of("n0") / "mean"
    assert main(["export", str(run), str(mean)]) == 2
    assert "missing: client 2" in capsys.readouterr().err, "it is on other hosts' disks"
    for name in ("n1", "n2"):
        shutil.copytree(cluster.of(name) / output.name / "model", run / "model", dirs_exist_ok=True)
    assert main(["export", str(run), str(mean)]) == 0 and (mean / "config.json").exists()
    assert not cluster.left()


def test_ctrl_c_under_pdsh_ends_every_process_of_every_host_and_below_deca_supervise_one_job_alone(cluster):
    """Two jobs share n1, on which the first Ctrl-C ends one and the second one the other."""
    keys = {"algorithm.inner_steps": 100_000, "checkpoint.every": 100_000, "run.resume": "auto"}
    alone, plain = job(cluster, "plain", {"n0": 1, "n1": 1}, sizes=(1, 1), **keys)
    below, supervised = job(cluster, "supervised", {"n1": 1, "n2": 1}, sizes=(1, 1), **keys)
    trains, ended = threading.Event(), threading.Event()

    def interrupt(process: subprocess.Popen) -> None:
        in_training(cluster, "n2", supervised, 1)(process)
        assert trains.wait(240)
        cluster.interrupt(process)

    def interrupt_later(process: subprocess.Popen) -> None:
        in_training(cluster, "n1", plain, 1)(process)
        trains.set()
        assert ended.wait(240) and process.poll() is None, "the other job ends by itself"
        cluster.interrupt(process)

    with ThreadPoolExecutor(1) as other:
        running = other.submit(cluster.run, "n0", alone, during=interrupt_later)
        asked = cluster.run("n1", ["deca", "supervise", *below], during=interrupt)
        ended.set()
        killed = running.result()
    assert asked.code == 0, asked.output[-4000:]
    *_, how, export = asked.output.rstrip().splitlines()
    assert "to continue: the same command" in how and "deca export" in export, "the last lines are the job's"
    assert killed.code == 1 and "Traceback" not in killed.output, killed.output[-4000:]
    assert not cluster.left()
    for first, output in (("n0", plain), ("n1", supervised)):
        assert (cluster.of(first) / output.name / "STOPPED").exists()
        assert not (cluster.of(first) / output.name / "DONE").exists()


def test_deca_stop_ends_a_job_whose_launcher_was_killed(cluster):
    """SIGKILL, of deepspeed and pdsh: the ranks notice nothing and train on."""
    command, output = job(cluster, "asked", {"n0": 1, "n1": 1}, sizes=(1, 1), **{"algorithm.inner_steps": 100_000})

    def during(process: subprocess.Popen) -> None:
        in_training(cluster, "n1", output, 1)(process)
        os.killpg(process.pid, signal.SIGKILL)

    cluster.run("n0", command, during=during)
    stopped = cluster.run("n0", ["deca", "stop", output])
    assert stopped.code == 0 and "STOPPED: " in stopped.output, stopped.output[-4000:]
    assert not cluster.left()


def test_mpirun_across_hosts_leaves_no_process_when_a_rank_is_killed(cluster):
    """The client of two ranks spans both hosts. No process of either stays when one of them is killed."""
    options = ("--launcher", "openmpi", "--launcher_args", "--mca btl_tcp_if_include lan")
    keys = {"algorithm.inner_steps": 100_000, "cluster.transport": "mpi"}
    command, output = job(cluster, "killed", {"n0": 2, "n1": 1}, *options, sizes=(1, 2), **keys)

    def during(process: subprocess.Popen) -> None:
        in_training(cluster, "n0", output, 1)(process)
        (there,) = [pid for pid, line in cluster.processes("n1").items() if "train.py" in line and "prted" not in line]
        os.kill(there, 9)

    finished = cluster.run("n0", command, during=during)
    assert finished.code != 0, finished.output[-4000:]
    assert not cluster.left()
    assert list((cluster.of("n1") / output.name / "heartbeats").iterdir()), "that host has a disk of its own"


def test_mistakes_on_other_hosts_are_told_with_the_host(cluster):
    """Two jobs at once: one whose other hosts do not start, each for a reason of its own, and one in which they do, but
    the model is missing there."""
    hosts = dict.fromkeys(("n0", "locked", "bare", "down", "nowhere"), 1)
    nobody, silent = job(cluster, "silent", hosts, sizes=(5,), **{"cluster.meet_s": 5})
    (cluster.of("n2") / "model").rename(cluster.of("n2") / "elsewhere")
    lame, without = job(cluster, "without", {"n1": 1, "n2": 1}, sizes=(1, 1))
    with ThreadPoolExecutor(2) as both:
        started = [both.submit(cluster.run, "n0", nobody), both.submit(cluster.run, "n1", lame)]
        first, second = (each.result() for each in started)
    (cluster.of("n2") / "elsewhere").rename(cluster.of("n2") / "model")
    assert first.code == 255 and "Traceback" not in first.output
    for reason in (
        "hosts locked, bare, down, nowhere: ranks 1, 2, 3, 4 did not start within 5 s; 1 of 5 ranks are there",
        "locked: root@locked: Permission denied (publickey)",
        "bare: bash: line 1: ",
        "down: ssh: connect to host down port 22: ",
        "nowhere: ssh: Could not resolve hostname nowhere: ",
        "deca doctor",
    ):
        assert first.output.count(reason) == 1, (reason, first.output[-4000:])
    assert second.code == 2 and "Traceback" not in second.output
    assert second.output.count("ERROR: rank 1 on n2") == 1, second.output[-4000:]
    assert second.output.count(f"there is no folder '{cluster.disk / 'model'}'") == 1
    hint = shlex.join(["deca", "doctor", "--hostfile", "HOSTS", *lame[lame.index("launchers/train.py") + 1 :]])
    assert second.output.count(f"`{hint}` looks at every host") == 1, "n2 does not see what deepspeed was given on n1"
    assert not cluster.left()
    assert not any((cluster.of(name) / each.name).exists() for name in HEALTHY for each in (silent, without))

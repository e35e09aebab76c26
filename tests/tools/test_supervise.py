"""`deca supervise`: when it starts a job again, when it does not, and how it hands on that the job is to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TextIO

import pytest
from jobs import BIN, REPOSITORY, processes_below, wait_until

from deca_ds.cli import main
from deca_ds.errors import (
    AbsentError,
    CheckpointError,
    ConfigError,
    CutOffError,
    DataError,
    DisconnectedError,
    DivergedError,
    LaunchError,
    ModelError,
    RankLostError,
    StallError,
    exit_code,
)
from deca_ds.transport.local import LocalNetwork

SCRIPT = str(REPOSITORY / "tests/tools/supervised_job.py")
KEYS = ("model.path=none", "data.train=[none]", "run.resume=auto", "checkpoint.every=10")


def supervise(folder: Path, plan: str, *keys: str) -> tuple[int, int]:
    """The exit code, and how many of the planned starts there were."""
    (folder / "run.plan").write_text(plan)
    job = [sys.executable, SCRIPT, f"run.output={folder / 'run'}", *KEYS, *keys]
    code = main(["supervise", "--pause", "0.01", "--restarts", "2", *job])
    return code, len(plan.split()) - len((folder / "run.plan").read_text().split())


@pytest.mark.parametrize(
    ("plan", "code", "starts", "told"),
    [
        ("done:0 1", 0, 1, ""),
        ("saved:137 saved:1 done:0 1", 0, 3, "newest checkpoint: inner step 20. Starting"),
        ("1 done:0 1", 0, 2, "newest checkpoint: inner step 0. Starting it again in 0.01 s (1 of 2 that bring"),
        ("2 done:0", 2, 1, ""),  # a mistake
        ("told:1 done:0", 2, 1, ""),  # a mistake, under torchrun
        ("saved:1 told:1 done:0 1", 0, 3, "the job ended with 2"),
        ("done:247 1", 0, 1, ""),  # a client was killed, and deepspeed tells its code
        ("1 stopped:1 1", 0, 2, "the job ended with 1"),  # torchrun
        ("both:1 1", 0, 1, ""),  # a rank failed while DONE was being written
        ("failed:1 stopped:1 1", 0, 2, "the job ended with 1"),
        ("lost:247 done:0 1", 0, 2, "the job ended with 0"),
        ("trained:2 done:0 1", 0, 2, "Starting it again"),  # a rank that hung
        ("saved:1 2 done:0 1", 0, 3, "(1 of 2 that bring nothing new)"),  # a host that is not back yet
        ("stopped:0 1", 0, 1, ""),  # told by somebody else
        ("lost:0 done:0 1", 0, 2, "the job ended with 0"),
        ("saved:1 1 1 137 done:0", 137, 4, "Giving up: 3 starts in a row have brought nothing new"),
        ("saved:1 1 1 saved:1 1 done:0 1", 0, 6, "newest checkpoint: inner step 20"),
        ("saved:1 diverged:2 done:0", 2, 2, "FAILED_client_001 says what to change first"),
        ("diverged:0 done:0", 2, 1, "it would diverge again"),  # the others continued, until they were too few
    ],
)
def test_a_job_is_started_again_as_long_as_that_may_help(tmp_path, capfd, plan, code, starts, told):
    assert supervise(tmp_path, plan) == (code, starts)
    said = capfd.readouterr().err
    assert told in said and said.count("Starting it again") == starts - 1, said


ABSENT = AbsentError("host n2 did not start within 60 s")
LOST = LocalNetwork(2).transport(0).lost(1, "from", 5, "Connection closed by peer")


@pytest.mark.parametrize(
    ("cause", "code", "again"),
    [
        *((kind("a mistake"), 2, False) for kind in (ConfigError, DataError, ModelError, LaunchError, CheckpointError)),
        (DivergedError("client 0 has diverged"), 2, False),
        *((error, 1, True) for error in (ABSENT, LOST, StallError("no progress"), RankLostError("rank 1 is gone"))),
        *((error, 1, True) for error in (CutOffError("out"), DisconnectedError("no agreement"), KeyError("a defect"))),
        (RuntimeError("Connection reset by peer"), 1, True),
        ("killed, under mpirun or srun", 137, True),
        ("killed, under deepspeed", 247, True),
        ("ssh failed, under pdsh", 255, True),
        ("ended by a second Ctrl-C", 130, True),
    ],
)
def test_what_may_succeed_again_is_started_again_though_nothing_was_trained(tmp_path, cause, code, again):
    if isinstance(cause, Exception):
        assert exit_code(cause) == code
    assert supervise(tmp_path, f"{code} done:0 1") == ((0, 2) if again else (code, 1))


@pytest.mark.parametrize(
    ("plan", "code", "starts"),
    [
        ("trained:137 join:trained:137 join:stopped:0 1", 0, 3),
        ("outlived:137 join:stopped:0 1", 0, 2),  # it died within a second of the first step
        ("trained:137 join:invited:137 join:stopped:0 1", 0, 3),
        ("trained:137 join:2 join:2 join:2 join:2", 2, 4),  # nobody to join any more
        ("trained:137 join:invited:1 join:invited:1 join:invited:1 done:0", 1, 4),  # though the others train on
        ("1 done:0", 1, 1),  # the job did not begin
        ("diverged:137 done:0", 137, 1),
        ("trained:137 join:other:137 join:stopped:0 1", 0, 3),  # another client has diverged
    ],
)
def test_a_rank_by_itself_joins_the_others_again(tmp_path, capfd, monkeypatch, plan, code, starts):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "n0", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    keys = ("cluster.on_failure=continue", "cluster.clients=2", "run.resume=never")
    assert supervise(tmp_path, plan, *keys) == (code, starts)
    assert capfd.readouterr().err.count("Starting it again") == starts - 1


def test_heartbeats_of_another_version_are_named(tmp_path, capfd, monkeypatch):
    """Those of an earlier start of the same rank tell how far it has trained."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "n0", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "run" / "heartbeats").mkdir(parents=True)
    (tmp_path / "run" / "heartbeats" / "rank_0001.json").write_text('{"rank": 1, "mood": "fine"}')
    keys = ("cluster.on_failure=continue", "cluster.clients=2", "run.resume=never")
    assert supervise(tmp_path, "done:0", *keys) == (2, 0)
    assert "no heartbeat of this version of deca_ds" in capfd.readouterr().err


def ask_by_terminal(supervisor: subprocess.Popen) -> None:
    """Ctrl-C: to all processes that the terminal's command consists of."""
    os.killpg(supervisor.pid, signal.SIGINT)


def start_supervisor(launcher: Path, script: str, *command: str, stderr: TextIO | None = None) -> subprocess.Popen:
    """Of a job whose launcher is this shell script, in a process group of its own, as from a terminal."""
    launcher.write_text(f"#!/bin/sh\n{script}")
    launcher.chmod(0o755)
    supervisor = [BIN / "deca", "supervise", str(launcher), *command, *KEYS]
    return subprocess.Popen(supervisor, start_new_session=True, stderr=stderr)


def end(supervisor: subprocess.Popen) -> None:
    """And all below it, whatever session they are in, if it still runs."""
    if supervisor.poll() is None:
        for process in processes_below(supervisor, lambda command: True):
            process.kill()
        supervisor.kill()


@pytest.mark.parametrize(
    ("name", "ask"),
    [
        ("mpirun", lambda supervisor: supervisor.terminate()),
        ("mpirun", ask_by_terminal),
        ("other", lambda supervisor: supervisor.terminate()),
        ("other", ask_by_terminal),
    ],
)
def test_a_signal_is_handed_on_and_the_job_is_not_started_again(tmp_path, name, ask):
    """The same to a launcher that hands SIGUSR1 on, and to one that does not, whose ranks are looked for."""
    hands_on = 'trap "kill -USR1 \\$!" USR1\n"$@" &\nwait\nwait\n'  # the signal has ended the first one
    (tmp_path / "run.plan").write_text("waits:0 done:0")
    job = sys.executable, SCRIPT, f"run.output={tmp_path / 'run'}"
    process = start_supervisor(tmp_path / name, hands_on if name == "mpirun" else '"$@"\nexit $?\n', *job)
    try:
        wait_until((tmp_path / "run.waits").exists, "started", process=process)
        ask(process)
        assert process.wait(timeout=200) == 0
    finally:
        end(process)
    assert (tmp_path / "run" / "STOPPED").exists() and (tmp_path / "run.plan").read_text() == "done:0"


def test_a_signal_that_finds_no_rank_yet_is_handed_on_to_those_that_come(tmp_path):
    """The stand-in does not end without one. That which comes while it is starting ends it otherwise."""
    go_on, told = tmp_path / "go_on", tmp_path / "told"
    (tmp_path / "run.plan").write_text("waits:0 done:0")
    launcher = f'touch {tmp_path}/runs\nwhile ! [ -e {go_on} ]; do sleep 0.05; done\n"$@"\nexit $?\n'
    job = sys.executable, SCRIPT, f"run.output={tmp_path / 'run'}"
    with told.open("w") as sink:
        process = start_supervisor(tmp_path / "other", launcher, *job, stderr=sink)
    try:
        wait_until((tmp_path / "runs").exists, "started", process=process)
        process.terminate()
        wait_until(lambda: "no rank on this host" in told.read_text(), "told", process=process)
        go_on.touch()
        wait_until(lambda: process.poll() is not None, "at its end")
    finally:
        end(process)
    assert told.read_text().count("no rank on this host") == 1 and "Starting it again" not in told.read_text()


def test_ranks_on_other_hosts_are_asked_through_the_folder(tmp_path):
    """The launcher's rank is none of its descendants, as under pdsh."""
    run = tmp_path / "run"
    (tmp_path / "run.plan").write_text("asked:0 done:0")
    launcher = f'(setsid "$@" &)\nwhile ! [ -e {run}/STOPPED ]; do sleep 0.05; done\n'
    process = start_supervisor(tmp_path / "pdsh", launcher, sys.executable, SCRIPT, f"run.output={run}")
    try:
        wait_until((tmp_path / "run.waits").exists, "started", process=process)
        ask_by_terminal(process)
        assert process.wait(timeout=200) == 0
    finally:
        end(process)
        (run / "STOP").touch()  # for the stand-in, if it has not been asked
    assert (tmp_path / "run.plan").read_text() == "done:0"


def test_a_second_interrupt_kills_ranks_that_have_not_stopped_yet(tmp_path):
    (tmp_path / "run.plan").write_text("deaf:0 done:0")
    job = sys.executable, SCRIPT, f"run.output={tmp_path / 'run'}"
    process = start_supervisor(tmp_path / "other", '"$@"\nexit $?\n', *job)
    try:
        for file in ("run.waits", "run.heard"):
            wait_until((tmp_path / file).exists, file, process=process)
            ask_by_terminal(process)
        assert process.wait(timeout=200) == 128 + signal.SIGKILL
    finally:
        end(process)


def test_a_second_interrupt_ends_a_job_that_has_not_stopped_yet(tmp_path):
    heard, runs = tmp_path / "heard", tmp_path / "runs"
    script = f'trap "touch {heard}" USR1\ntrap "exit 9" INT\ntouch {runs}\nwhile :; do sleep 0.05; done\n'
    process = start_supervisor(tmp_path / "mpirun", script, "train.py")
    try:
        for file in (runs, heard):
            wait_until(file.exists, f"at {file.name}", process=process)
            ask_by_terminal(process)
        assert process.wait(timeout=200) == 9
    finally:
        end(process)


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["mpirun", "-n", "2"], "no training script in 'mpirun -n 2'"),
        (["mpirun", "train.py", *KEYS, "run.resume=never"], "run.resume = 'never': a new start would be refused"),
        (["mpirun", "train.py", *KEYS, "checkpoint.every=0"], "checkpoint.every = 0"),
        (["mpirun", "train.py", *KEYS, "run.resum=auto"], "run.resum"),
        (["no-such-launcher", "train.py", *KEYS], "cannot start 'no-such-launcher'"),
    ],
)
def test_what_could_not_be_started_again_is_refused(tmp_path, capsys, monkeypatch, command, told):
    monkeypatch.chdir(tmp_path)
    assert main(["supervise", *command]) == 2
    assert told in capsys.readouterr().err and not list(tmp_path.iterdir())

"""One run, one folder: who comes second is refused, whatever the first has written by then, and a dead job's file is
in nobody's way."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from itertools import count
from pathlib import Path

import pytest

from deca_ds.config.resume import is_used
from deca_ds.errors import ConfigError, LaunchError
from deca_ds.run_folder import LOCK
from deca_ds.training.claim import check_free, check_held, leave_place, release, take, take_place
from deca_ds.training.lock_file import Holder
from deca_ds.watchdog.stop import is_requested, request_stop

HOLDER = """
import sys, time
from pathlib import Path
from deca_ds.training.claim import take
print(take(Path(sys.argv[1]), lambda: None, "other"), flush=True)
time.sleep(100)
"""

# Processes of as many hosts take one folder at one moment, on a file system that has no locks, or keeps them on a host.
RACE = """
import errno, fcntl, os, socket, struct, sys, time
from pathlib import Path
from deca_ds.errors import ConfigError
from deca_ds.training.claim import take

folder, locks, hosts = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])

def lockf(descriptor, operation):
    if locks == "none":
        raise OSError(errno.ENOLCK, "no locks")

def asks(descriptor, command, question):
    lockf(descriptor, None)
    return struct.pack("hhqqi", fcntl.F_UNLCK, 0, 0, 0, 0)

fcntl.lockf, fcntl.fcntl = lockf, asks
begin, go = os.pipe()
children = []
for host in range(hosts):
    child = os.fork()
    if child:
        children.append(child)
        continue
    socket.gethostname = lambda: f"n{host}"
    os.close(go)
    os.read(begin, 1)
    try:
        take(folder, lambda: None, beats=True)
    except ConfigError as error:
        os._exit(0 if "taken by another job: process" in str(error) else 2)
    (folder / "heartbeats").mkdir(exist_ok=True)
    for number in range(10_000):  # until the parent, which knows when all others have ended, ends it
        (folder / "heartbeats" / f"rank_{host:04d}.json").write_text(str(number))
        (folder / f"host_{host}").touch()
        time.sleep(0.02)
    os._exit(3)
os.close(go)
codes = []
while len(codes) < hosts - 1:
    child, status = os.wait()
    children.remove(child)
    codes.append(os.waitstatus_to_exitcode(status))
while not list(folder.glob("host_*")):
    time.sleep(0.02)
print(codes == [0] * len(codes), len(list(folder.glob("host_*"))), flush=True)
os.kill(children[0], 9)
"""

# Processes that take a folder each, and are killed, the first one at its first call to the operating system, the second
# one at its second call, and so on. Prints how each has ended.
KILLED = """
import os, sys
from pathlib import Path
from deca_ds.training import claim

def counting(function):
    def call(*arguments, **options):
        global left
        left -= 1
        if left == 0:
            os._exit(9)
        return function(*arguments, **options)
    return call

started = []
for left, folder in enumerate(sys.argv[1:], 1):
    if (child := os.fork()) == 0:
        os.open, os.pwrite, os.close, Path.unlink = map(counting, (os.open, os.pwrite, os.close, Path.unlink))
        claim.take(Path(folder), lambda: None)
        os._exit(0)
    started.append(child)
print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in started))
"""

ASKS = """
import sys
from pathlib import Path
from deca_ds.training.claim import check_free
check_free(Path(sys.argv[1]))
"""


def nothing() -> None:
    """The folder is what the run needs."""


@contextmanager
def heartbeats(output: Path) -> Iterator[None]:
    """A rank of another host beats in the folder meanwhile."""
    folder, over = output / "heartbeats", threading.Event()

    def beat() -> None:
        for number in count():
            (folder / "rank_0001.json").write_text(str(number))
            if over.wait(0.02):
                return

    folder.mkdir()
    (folder / "rank_0001.json").touch()  # before the thread, which may begin late
    rank = threading.Thread(target=beat)
    rank.start()
    try:
        yield
    finally:
        over.set()
        rank.join()
        shutil.rmtree(folder)


@pytest.fixture
def other(tmp_path: Path):
    """Another job, which has the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "other\n"
    yield process
    process.kill()
    process.wait()


def test_one_who_only_asks_is_told_the_same_and_takes_nothing(other, tmp_path: Path) -> None:
    before = (tmp_path / LOCK).read_bytes()
    check_free(tmp_path / "new")
    with pytest.raises(ConfigError, match=rf"taken by another job: process {other.pid} on .*, started 20"):
        check_free(tmp_path)
    assert not (tmp_path / "new").exists() and (tmp_path / LOCK).read_bytes() == before
    other.kill()
    other.wait()
    check_free(tmp_path)
    with heartbeats(tmp_path), pytest.raises(ConfigError, match="taken by another job"):
        check_free(tmp_path)
    take(tmp_path, nothing)
    check_free(tmp_path)  # its own
    asked = subprocess.run([sys.executable, "-c", ASKS, str(tmp_path)], capture_output=True, text=True)
    assert f"taken by another job: process {os.getpid()} on" in asked.stderr, "the lock was not lost by asking"
    release(tmp_path)


def test_the_second_job_is_told_who_has_the_folder_and_writes_nothing(other, tmp_path: Path) -> None:
    before = (tmp_path / LOCK).read_bytes()
    with pytest.raises(ConfigError, match=rf"taken by another job: process {other.pid} on .*, started 20"):
        take(tmp_path, nothing)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK] and (tmp_path / LOCK).read_bytes() == before
    assert take(tmp_path, nothing, "other") == "other", "a rank of the same job"


def test_what_an_earlier_job_was_asked_does_not_stop_this_one(tmp_path: Path) -> None:
    request_stop(tmp_path)
    take(tmp_path, nothing)
    assert not is_requested(tmp_path)
    release(tmp_path)


def test_the_file_of_a_killed_job_is_taken_over(other, tmp_path: Path) -> None:
    other.send_signal(signal.SIGKILL)
    other.wait()
    job = take(tmp_path, nothing)
    held = json.loads((tmp_path / LOCK).read_text())
    assert (held["job"], held["pid"]) == (job, os.getpid()) and take(tmp_path, nothing) == job
    release(tmp_path)


def test_a_folder_that_was_moved_while_the_run_continued_is_found_out(tmp_path: Path) -> None:
    output = tmp_path / "run"
    check_held(output)  # a rank that has not taken it knows nothing
    take(output, nothing)
    check_held(output)
    output.rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match="moved or removed"):
        check_held(output)
    output.mkdir()
    (output / LOCK).write_text("another job's")
    with pytest.raises(ConfigError, match="moved or removed"):
        check_held(output)
    (output / LOCK).unlink()
    output.rmdir()
    (tmp_path / "moved").rename(output)
    check_held(output)
    release(output)


def test_a_job_whose_first_rank_is_gone_may_still_be_at_work(other, tmp_path: Path) -> None:
    other.kill()
    other.wait()
    with heartbeats(tmp_path):
        with pytest.raises(ConfigError, match="taken by another job"):
            take(tmp_path, nothing)
        (tmp_path / "STOPPED").touch()
        take(tmp_path, nothing)
    release(tmp_path)


def test_the_marker_of_the_job_before_does_not_end_the_one_that_continues_its_run(other, tmp_path: Path) -> None:
    """Which removes it when it has loaded, and which here has its lock on another host."""
    other.kill()
    other.wait()
    (tmp_path / "STOPPED").touch()
    taken = (tmp_path / LOCK).stat().st_mtime_ns
    os.utime(tmp_path / "STOPPED", ns=(taken - 1, taken - 1))
    with heartbeats(tmp_path):
        for asks in (check_free, lambda output: take(output, nothing)):
            with pytest.raises(ConfigError, match="taken by another job"):
                asks(tmp_path)
        os.utime(tmp_path / "STOPPED", ns=(taken, taken))
        take(tmp_path, nothing)
    release(tmp_path)


@pytest.mark.parametrize("alive", [True, False])
def test_without_locks_heartbeats_tell_whether_the_job_lives(other, tmp_path: Path, monkeypatch, alive: bool) -> None:
    def without(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    for asks in ("lockf", "fcntl"):
        monkeypatch.setattr(fcntl, asks, without)
    if not alive:
        other.kill()
        other.wait()
        (tmp_path / "heartbeats").mkdir()
        (tmp_path / "heartbeats" / "rank_0000.json").touch()
        take(tmp_path, nothing)
        release(tmp_path)
    else:
        with pytest.raises(ConfigError, match="taken by another job"):
            take(tmp_path, nothing)


def test_what_another_job_has_done_meanwhile_is_seen_when_the_folder_is_taken(tmp_path: Path) -> None:
    folder, checks = tmp_path / "run", iter([None, ConfigError("a run has begun")])

    def check() -> None:
        if (error := next(checks)) is not None:
            raise error

    with pytest.raises(ConfigError, match="a run has begun"):
        take(folder, check)
    assert not folder.exists()


def test_a_rank_joins_once_at_a_time(tmp_path: Path) -> None:
    take_place(tmp_path / "no run", 3)
    assert not list(tmp_path.iterdir())
    joining = "import sys; from pathlib import Path; from deca_ds.training.claim import take_place\n"
    joining += "take_place(Path(sys.argv[1]), 3); print('in', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", joining, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "in\n"
        with pytest.raises(LaunchError, match=rf"joins the job as rank 3, or has joined it: process {first.pid} on "):
            take_place(tmp_path, 3)
        take_place(tmp_path, 2)
        first.kill()
    take_place(tmp_path, 3)
    for rank in (2, 3):
        leave_place(tmp_path, rank)
    assert not list(tmp_path.iterdir())
    take_place(tmp_path, 3)


def test_a_rank_that_joins_tells_of_a_disk_that_is_full(tmp_path: Path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ConfigError, match="cannot be written to: No space left on device"):
        take_place(tmp_path, 3)


@pytest.mark.parametrize("locks", ["none", "of a host"])
@pytest.mark.parametrize("folder", ["new", "a dead job's", "a dead job's, taken over by one that was killed"])
def test_of_several_hosts_one_takes_the_folder_whatever_locks_are_worth(
    tmp_path: Path, locks: str, folder: str
) -> None:
    run = tmp_path / "run"
    if folder != "new":
        (run / "heartbeats").mkdir(parents=True)
        names = ["LOCK"] if folder == "a dead job's" else ["LOCK", "LOCK_after_J"]
        for name, job in zip(names, "JK", strict=False):
            made = asdict(Holder(job, "n9", 4711, 1.0, "2026-11-26 23:48:09"))
            (run / name).write_text(json.dumps(made) + "\n")
        (run / "heartbeats" / "rank_0000.json").touch()
    race = subprocess.run([sys.executable, "-c", RACE, str(run), locks, "6"], capture_output=True, text=True)
    assert race.stdout == "True 1\n", race.stderr
    assert not [path for path in run.iterdir() if path.name.startswith("LOCK_")]


@pytest.mark.parametrize("folder", ["new", "a dead job's"])
def test_a_job_that_is_killed_while_it_takes_the_folder_is_in_nobodys_way(tmp_path: Path, folder: str) -> None:
    """At whatever call to the operating system."""
    runs = [tmp_path / str(call) for call in range(1, 21)]
    for run in runs:
        run.mkdir()
        if folder != "new":
            dead = asdict(Holder("J", socket.gethostname(), 0, 1.0, "2026-11-26 23:48:09"))
            (run / LOCK).write_text(json.dumps(dead) + "\n")
    ended = subprocess.run([sys.executable, "-c", KILLED, *map(str, runs)], capture_output=True, text=True)
    codes = ended.stdout.split()
    assert codes == sorted(codes, reverse=True) and codes.count("9") >= 3 and codes[-1] == "0", ended.stderr

    def takes(run: Path) -> None:
        assert not is_used(run), "as run.resume=never sees it"
        job = take(run, nothing)
        assert json.loads((run / LOCK).read_text())["job"] == job
        assert [path.name for path in run.iterdir()] == [LOCK]
        release(run)

    with ThreadPoolExecutor(len(runs)) as pool:  # they look for heartbeats first
        list(pool.map(takes, runs[: codes.count("9") + 1]))


def test_ranks_of_one_job_take_over_together_on_a_host_that_does_not_share_the_first_ranks_folder(
    tmp_path: Path,
) -> None:
    dead = asdict(Holder("J", socket.gethostname(), 0, 1.0, "2026-11-26 23:48:09"))
    (tmp_path / LOCK).write_text(json.dumps(dead) + "\n")
    (tmp_path / "heartbeats").mkdir()
    (tmp_path / "heartbeats" / "rank_0000.json").touch()
    code = HOLDER.replace("time.sleep(100)", "(Path(sys.argv[1]) / 'heartbeats' / f'rank_{sys.argv[2]}.json').touch()")
    code += "sys.stdin.read()"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), str(rank)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(3)
    ]  # fmt: skip
    said = [rank.stdout.readline() for rank in ranks]
    told = [rank.communicate()[1] for rank in ranks]
    assert said == ["other\n"] * 3, told

"""One run, one folder: who comes second is refused, whatever the first has written by then, and a dead job's file is
in nobody's way."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest

from deca_ds.errors import ConfigError, LaunchError
from deca_ds.run_folder import LOCK
from deca_ds.training.claim import check_free, check_held, leave_place, release, take, take_place
from deca_ds.watchdog.stop import is_requested, request_stop

HOLDER = """
import sys, time
from pathlib import Path
from deca_ds.training.claim import take
print(take(Path(sys.argv[1]), lambda: None, "other"), flush=True)
time.sleep(100)
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

    monkeypatch.setattr(fcntl, "lockf", without)
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

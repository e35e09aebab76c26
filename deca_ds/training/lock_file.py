"""Files that name the process that holds them, each under a lock that ends with that process, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import struct
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

_WRITTEN_S = 2.0  # for the process that has just created the file to write into it
_FLOCK = "hhqqi"  # struct flock of Linux: type, whence, start, length, process
_held: dict[Path, tuple[int, str]] = {}  # what this process holds: file descriptor, which stays open, and job


@dataclass(frozen=True)
class Holder:
    """Which process holds a file. job: a name that no other job has. created: when the process started, in seconds
    since 1970. started: the same for people. beats: whether its job writes heartbeats."""

    job: str
    host: str
    pid: int
    created: float
    started: str
    beats: bool = True

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, started {self.started}"

    @staticmethod
    def this_process(job: str, *, beats: bool) -> Holder:
        """Make the holder that this process is."""
        created, now = psutil.Process().create_time(), time.strftime("%Y-%m-%d %H:%M:%S")
        return Holder(job, socket.gethostname(), os.getpid(), created, now, beats)

    @staticmethod
    def read(descriptor: int) -> Holder | None:
        """Read the holder from an open file; None if the file is empty or only partly written."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            return Holder(**json.loads(os.pread(descriptor, 4096, 0)))
        return None

    @property
    def is_here(self) -> bool:
        """Whether it is, or was, a process of this host."""
        return self.host == socket.gethostname()

    @property
    def is_alive(self) -> bool:
        """Whether it is a process of this host that lives."""
        if self.is_here:
            with contextlib.suppress(psutil.NoSuchProcess):
                return abs(psutil.Process(self.pid).create_time() - self.created) < 1.0
        return False


def create(file: Path, job: str, *, beats: bool) -> None:
    """Create the file and hold it. Raises FileExistsError if it exists; of several processes, one alone succeeds."""
    descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
    try:
        hold(file, descriptor, job, beats=beats)
    except BaseException:
        file.unlink(missing_ok=True)
        os.close(descriptor)
        raise


def hold(file: Path, descriptor: int, job: str, *, beats: bool = True) -> None:
    """Write this process into the open file as its holder, lock it, and keep it open until `give_back`."""
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(asdict(Holder.this_process(job, beats=beats))).encode() + b"\n", 0)
    os.fsync(descriptor)
    lock(descriptor)
    _held[file] = descriptor, job


def job_of(file: Path) -> str | None:
    """Return the job for which this process holds the file; None if it does not."""
    return _held[file][1] if file in _held else None


def is_there(file: Path) -> bool:
    """Return whether the file that this process holds is still the one of this name."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(_held[file][0]), os.stat(file))
    return False


def give_back(file: Path) -> None:
    """Remove the file if this process holds it, and the folder that it is in if that is empty then."""
    descriptor, _ = _held.pop(file, (None, ""))
    if descriptor is not None:
        file.unlink(missing_ok=True)
        os.close(descriptor)
        with contextlib.suppress(OSError):  # other files are there
            file.parent.rmdir()


def lock(descriptor: int) -> bool | None:
    """Try to lock the file; returns whether this process has the lock, None if the file system has no locks."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True


def is_free(descriptor: int) -> bool | None:
    """Return whether this process would get the lock now. It does not take it, because a job that starts at this moment
    would find it taken. None if the file system has no locks."""
    question = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        answer = fcntl.fcntl(descriptor, fcntl.F_GETLK, question)
    except OSError:
        return None
    return bool(struct.unpack(_FLOCK, answer)[0] == fcntl.F_UNLCK)


def wait_for_holder(descriptor: int) -> Holder | None:
    """Return the holder that stands in the open file. One that has just created it gets time to write."""
    deadline = time.monotonic() + _WRITTEN_S
    while (holder := Holder.read(descriptor)) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return holder

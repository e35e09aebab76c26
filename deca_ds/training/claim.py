"""One run, one folder: a job takes its output folder for itself before it writes anything there.

The file LOCK names the process that has it (lock_file.py). It is created exclusively, so that a job that comes second
is refused; a file that a killed job left stands in nobody's way. A lock says nothing where the file system has none or
keeps it on one host, nor of a job whose first rank is gone while others continue. So a job that finds the file of one
that left no marker of its end takes the folder only if no rank there shows a sign of life.

A rank that joins a job by itself does not take the folder, but its own place there, in the same way.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from deca_ds.checkpoint.done import is_marked_since
from deca_ds.errors import ConfigError, LaunchError
from deca_ds.launch import Launch
from deca_ds.run_folder import LOCK
from deca_ds.training.lock_file import Holder, give_back, hold, is_free, is_there, job_of, lock, wait_for_holder
from deca_ds.watchdog.heartbeats import FOLDER as HEARTBEATS
from deca_ds.watchdog.heartbeats import PERIOD_S
from deca_ds.watchdog.stop import forget_request

if TYPE_CHECKING:
    from deca_ds.launch.store import JobStore

_WATCH_S = 3 * PERIOD_S  # for a sign of life


def take_for_job(output: Path, launch: Launch, store: JobStore, check: Callable[[], object]) -> None:
    """Call `take` for the folder, for all ranks of a job, also on hosts that do not share the first rank's folder."""
    own = None
    if launch.rank == launch.first:
        own = take(output, check)
    job = store.gather(launch, "output/taken", own)[launch.first]
    if launch.rank != launch.first:
        take(output, lambda: None, job)
    store.gather(launch, "output/all", None)  # no rank writes to the folder before all have taken it


def take(output: Path, check: Callable[[], object], job: str | None = None) -> str:
    """Take the folder and return the job that has it; does nothing where this process or `job` has it already.

    check: raises an error if the folder is not what the run needs; called before and after it is taken.
    Raises ConfigError if another job has it.
    """
    file = output.resolve() / LOCK
    if (mine := job_of(file)) is not None:
        return mine
    check()
    job = job or secrets.token_hex(8)
    try:
        output.mkdir(parents=True, exist_ok=True)
        _create(file, output, job)
        forget_request(output)
    except OSError as error:
        raise ConfigError(
            f"the output folder cannot be written to: {error.strerror or error}", where=f"run.output, {output}"
        ) from error
    try:
        check()
    except BaseException:
        release(output)
        raise
    return job


def check_free(output: Path) -> None:
    """Raise ConfigError if another job has the folder, by the rule of `take`, but without taking it."""
    file = output.resolve() / LOCK
    if job_of(file) is not None:  # and closing it here would give up the lock
        return
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError:
        return
    try:
        locked = is_free(descriptor)
        holder = wait_for_holder(descriptor, locked)
        if locked is False or _shows_life(output, holder, locked):
            raise _taken(file, output, holder)
    finally:
        os.close(descriptor)


def take_place(output: Path, rank: int) -> None:
    """Take the place of `rank` in the job in `output` for this process, which joins it, as long as the process lives or
    until it leaves the place.

    Raises LaunchError if another process has it already, as far as the file system tells, and ConfigError where the
    folder cannot be written to.
    """
    file = _place(output, rank)
    if not output.is_dir():  # there is no such run, which is told elsewhere
        return
    try:
        file.parent.mkdir(exist_ok=True)
        while True:
            descriptor = os.open(file, os.O_CREAT | os.O_RDWR, 0o644)
            if lock(descriptor) is False:
                break
            with contextlib.suppress(FileNotFoundError):  # its holder has left the place meanwhile
                if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                    hold(file, descriptor, "")
                    return
            os.close(descriptor)
    except OSError as error:
        raise ConfigError(
            f"the output folder cannot be written to: {error.strerror or error}", where=f"run.output, {file}"
        ) from error
    holder = wait_for_holder(descriptor, False)
    os.close(descriptor)
    raise LaunchError(
        f"another process joins the job as rank {rank}, or has joined it" + f": {holder}" * (holder is not None),
        where=str(file),
        fix="leave that one alone, or end it first",
    )


def leave_place(output: Path, rank: int) -> None:
    """Give the place of `rank` back, because this process does not join the job after all."""
    give_back(_place(output, rank))


def _place(output: Path, rank: int) -> Path:
    return output.resolve() / HEARTBEATS / f"rank_{rank:04d}.joined"


def check_held(output: Path) -> None:
    """Raise ConfigError if the folder that this process has taken is no longer there; of others it knows nothing."""
    file = output.resolve() / LOCK
    if job_of(file) is None or is_there(file):
        return
    raise ConfigError(
        f"the output folder {str(output)!r} was moved or removed during the run",
        where=f"run.output, {file}",
        fix="move it back, without what has been written there since, and continue with run.resume=require, if there "
        "is a checkpoint",
    )


def release(output: Path) -> None:
    """Give back a folder in which no job continues, and remove it if it is empty."""
    give_back(output.resolve() / LOCK)


def _create(file: Path, output: Path, job: str) -> None:
    while True:
        try:
            descriptor, created = os.open(file, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644), True
        except FileExistsError:
            descriptor, created = os.open(file, os.O_RDWR), False
        try:
            locked = lock(descriptor)
            if not created or locked is False:
                holder = wait_for_holder(descriptor, locked)
                if holder is not None and holder.job == job:
                    os.close(descriptor)
                    return
                if locked is False or _shows_life(output, holder, locked):
                    raise _taken(file, output, holder)
            if os.fstat(descriptor).st_ino == os.stat(file).st_ino:
                break
        except FileNotFoundError:  # the holder has given the folder back meanwhile
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    hold(file, descriptor, job)


def _shows_life(output: Path, holder: Holder | None, locked: bool | None) -> bool:
    """Return whether the job that has left its file in the folder may still be at work."""
    if is_marked_since(output, output / LOCK):
        return False
    if holder is not None and not locked and holder.is_alive:
        return True
    before, deadline = _heartbeats(output), time.monotonic() + _WATCH_S
    while before and time.monotonic() < deadline:
        time.sleep(0.1)
        if _heartbeats(output) != before:
            return True
    return locked is None and not before  # there is nothing to tell by


def _heartbeats(output: Path) -> dict[str, bytes]:
    found = {}
    for path in (output / HEARTBEATS).glob("rank_*.json"):
        with contextlib.suppress(OSError):
            found[path.name] = path.read_bytes()
    return found


def _taken(file: Path, output: Path, holder: Holder | None) -> ConfigError:
    who = "another job"
    if holder is not None:
        who += f": {holder}"
    return ConfigError(
        f"the output folder {str(output)!r} is taken by {who}",
        where=f"run.output, {file}",
        fix="wait until that job has ended, or stop it, or name another folder; if it is surely gone, remove the file",
    )

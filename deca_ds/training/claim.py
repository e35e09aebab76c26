"""One run, one folder: a job takes its output folder for itself before it writes anything there.

The file LOCK names the process that has it (lock_file.py). It is created exclusively, so that a job that comes second
is refused; a file that a killed job left stands in nobody's way. A lock says nothing where the file system has none or
keeps it on one host, nor of a job whose first rank is gone while others continue. So a job that finds the file of one
that left no marker of its end takes the folder over only if no rank there shows a sign of life.

No lock decides who gets the folder, but the exclusive creation of a file, in which the file system lets one process
alone succeed. To take over a file that names another job, a process first creates a second one, whose name has that job
in it, and then looks whether the first still names that job. A process that is killed there leaves the second file
behind, which the next one takes over in the same way.

A rank that joins a job by itself does not take the folder, but its own place there; of two that do so at the same
moment, a lock decides.
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
from deca_ds.errors import ConfigError, LaunchError, in_words
from deca_ds.launch import Launch
from deca_ds.run_folder import BEAT, HEARTBEATS, JOINED, LOCK, numbered
from deca_ds.training.lock_file import Holder, create, give_back, hold, is_free, is_there, job_of, lock, wait_for_holder
from deca_ds.watchdog.heartbeats import PERIOD_S, SILENCE_S
from deca_ds.watchdog.stop import forget_request

if TYPE_CHECKING:
    from deca_ds.launch.store import JobStore

_WATCH_S = 3 * PERIOD_S  # for a heartbeat after the last one


def take_for_job(
    output: Path, launch: Launch, store: JobStore, check: Callable[[], object], show_life: Callable[[Path], None]
) -> None:
    """Call `take` for the folder, for all ranks of a job, also on hosts that do not share the first rank's folder.
    show_life: has this rank's heartbeats begin there, from which other hosts learn that the job lives."""
    own = None
    if launch.rank == launch.first:
        own = take(output, check, beats=True)
        show_life(output)
    job = store.gather(launch, "output/taken", own)[launch.first]
    if launch.rank != launch.first:
        take(output, lambda: None, job, beats=True)
        show_life(output)
    store.gather(launch, "output/all", None)  # no rank writes anything else there before all have taken it


def take(output: Path, check: Callable[[], object], job: str | None = None, *, beats: bool = False) -> str:
    """Take the folder and return the job that has it; does nothing where this process or `job` has it already.

    check: raises an error if the folder is not what the run needs; called before and after it is taken. beats: whether
    heartbeats begin there at once. Raises ConfigError if another job has it.
    """
    file = output.resolve() / LOCK
    if (mine := job_of(file)) is not None:
        return mine
    check()
    job = job or secrets.token_hex(8)
    try:
        if _seize(file, output, job, beats=beats):
            for right in file.parent.glob(f"{LOCK}_*"):  # to take over from jobs that do not have the folder any more
                right.unlink(missing_ok=True)
        forget_request(output)
    except OSError as error:
        raise _not_writable(error, output) from error
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
    with contextlib.suppress(OSError):
        _holder_without_life(file, output)


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
        raise _not_writable(error, file) from error
    holder = wait_for_holder(descriptor)
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
    return output.resolve() / HEARTBEATS / JOINED.format(rank)


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


def _seize(file: Path, output: Path, job: str, *, beats: bool) -> bool:
    """Create the file, or take it over from a job that is gone. Returns whether this process holds it now, and not
    another one of `job`. Raises ConfigError if another job has it."""
    while True:
        with contextlib.suppress(FileNotFoundError):  # its holder has given it, or the folder, back meanwhile
            output.mkdir(parents=True, exist_ok=True)
            try:
                create(file, job, beats=beats)
                return True
            except FileExistsError:
                former = _holder_without_life(file, output, job)
            if former is not None and former.job == job:
                return False
            if _take_over(file, output, former, job, beats=beats):
                return True
        time.sleep(0.02)


def _take_over(file: Path, output: Path, former: Holder | None, job: str, *, beats: bool) -> bool:
    """Take the file over from `former`, which is gone; returns False if another process was faster."""
    right = file.with_name(f"{file.name}_after_{former.job if former else 'nobody'}")
    if not _seize(right, output, job, beats=beats):
        return False
    try:
        descriptor = os.open(file, os.O_RDWR)  # anew, so that what other hosts have written is seen
        if Holder.read(descriptor) == former:
            hold(file, descriptor, job, beats=beats)
            return True
        os.close(descriptor)
        return False
    finally:
        give_back(right)


def _holder_without_life(file: Path, output: Path, job: str = "") -> Holder | None:
    """Return the holder of the file, which is `job` or is gone; None if the file does not say who it is. Raises
    ConfigError if another job has it."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        while True:
            holder = wait_for_holder(descriptor)
            if holder is not None and holder.job == job:
                return holder
            lives = _shows_life(descriptor, file, output, holder)
            if Holder.read(descriptor) == holder:  # else it has been taken over meanwhile
                break
    finally:
        os.close(descriptor)
    if lives:
        raise _taken(file, output, holder)
    return holder


def _shows_life(descriptor: int, file: Path, output: Path, holder: Holder | None) -> bool:
    """Return whether the job that the file names may still be at work in the folder."""
    free = is_free(descriptor)
    if free is False:
        return True
    if file.name == LOCK and is_marked_since(output, file):
        return False
    if holder is not None and holder.is_alive:
        return True
    begun = _have_begun(output, file)
    if not begun and free and holder is not None and holder.is_here:
        return False
    if not begun and holder is not None and not holder.beats:
        return free is None  # there is nothing to tell by
    before, deadline = _heartbeats(output), time.monotonic() + (_WATCH_S if begun else SILENCE_S)
    while time.monotonic() < deadline:
        time.sleep(0.1)
        if _heartbeats(output) != before or is_free(descriptor) is False:
            return True
    return False


def _have_begun(output: Path, file: Path) -> bool:
    """Return whether heartbeats have been written since the file was."""
    with contextlib.suppress(OSError):
        since = file.stat().st_mtime_ns
        return any(path.stat().st_mtime_ns >= since for path in numbered(output / HEARTBEATS, BEAT).values())
    return False


def _heartbeats(output: Path) -> dict[str, bytes]:
    found = {}
    os.listdir(output)  # or a network file system may not see a folder that another host has just made
    for path in numbered(output / HEARTBEATS, BEAT).values():
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


def _not_writable(error: OSError, place: Path) -> ConfigError:
    return ConfigError(
        f"the output folder cannot be written to: {in_words(error)}",
        where=f"run.output, {place}",
        fix="make room there, or allow writing, or name another folder",
    )

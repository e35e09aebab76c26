"""Which processes have started this one: its parent, and the parent's parent.

They are noted when deca_ds is imported. The imports of torch and DeepSpeed, which follow, take so long that a launcher
may be killed meanwhile, and the system gives a process that has lost its parent another one. Nobody notices a launcher
that is killed before the note, while the interpreter starts: that the parent is process 1 says nothing, because the
launcher itself is process 1 in many containers.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import NamedTuple


class Process(NamedTuple):
    """name, command: its name and command line; empty if it is gone, or not ours to look at. parent: its process id, 0
    if that is unknown."""

    pid: int
    name: str = ""
    command: tuple[str, ...] = ()
    parent: int = 0


class StartedBy(NamedTuple):
    parent: Process
    grandparent: Process


def started_by() -> StartedBy:
    """Return the processes above this one, as they were when it began."""
    return _noted


def _look(pid: int) -> Process:
    with suppress(OSError):  # without /proc, the process id alone is known
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            before, _, after = file.read().rpartition(")")
        with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
            command = tuple(file.read().rstrip("\0").split("\0"))
        return Process(pid, before.partition("(")[2], command, int(after.split()[1]))
    return Process(pid)


def _note() -> None:
    global _noted
    parent = _look(os.getppid())
    _noted = StartedBy(parent, _look(parent.parent))


_noted: StartedBy
_note()
os.register_at_fork(after_in_child=_note)

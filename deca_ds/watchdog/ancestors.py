"""The processes above a rank that belong to its job: the launcher, which started it, and above that, if there is one, a
`deepspeed` runner.

`deepspeed` is two processes on the host where it is typed: the runner, which people see and signal, and below it the
launcher of the ranks. SIGTERM, for example, ends the runner alone. Ctrl-C ends the runner, too, and the launcher kills
all ranks that have not ended 30 s later, whatever they are saving: so the ranks, when they have agreed to stop, end it
first. A shell belongs to no job, and neither does anything further above: with nohup or setsid it is meant to go before
the job does.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import psutil

from deca_ds.launch import Launch
from deca_ds.launch.given import DEEPSPEED
from deca_ds.printing import print_wrapped
from deca_ds.watchdog.started_by import started_by
from deca_ds.watchdog.stop import StopByCommit, StopByStore

_SHELLS = ("sh", "ash", "bash", "busybox", "csh", "dash", "fish", "ksh", "tcsh", "zsh")
_LAUNCHER = "deepspeed.launcher.launch"
_RUNNER_GONE = "`deepspeed` is gone: the job saves a checkpoint and stops after this inner step"


class Ancestors:
    """The processes above this one, as they were when it began."""

    def __init__(self) -> None:
        parent, above = started_by()
        self._parent, self._is_shell = parent.pid, parent.name in _SHELLS
        self._runner = above.pid if is_runner(above.command) else None
        self._kills_ranks = self._runner is not None and _script(parent.command) == _LAUNCHER
        self._missed_launcher = False
        self._launcher: psutil.Process | None = None
        if os.getppid() == parent.pid:  # else another process may have its number
            with contextlib.suppress(psutil.Error):  # it is not ours to look at
                self._launcher = psutil.Process(parent.pid)

    def look(self, launch: Launch, stop: StopByStore | StopByCommit) -> str | None:
        """Return why this rank has to end, in words, if its launcher was killed. If only the runner is gone, have the
        job stop, and then end DeepSpeed's launcher."""
        if launch.launcher == "python":
            return None
        # a launcher or runner that was told to stop, as this rank was, may end before this rank is done
        if stop.pending:
            if stop.agreed and not launch.local_rank and self.runner_is_gone():
                self._end_launcher()
            return None
        if self.launcher_is_gone():
            # another rank may have ended it, and know a moment earlier than this one that the job stops
            missed, self._missed_launcher = self._missed_launcher, True
            return "the launcher is gone, so this rank stops" if missed else None
        if self.runner_is_gone():
            if not launch.local_rank:
                print_wrapped(f"\n{_RUNNER_GONE}")
            stop.ask()
        return None

    def launcher_is_gone(self) -> bool:
        """Return whether the launcher has ended, so that no process would collect this one."""
        return not self._is_shell and os.getppid() != self._parent

    def runner_is_gone(self) -> bool:
        """Return whether there was a runner, and the launcher has outlived it."""
        if self._runner is None or self._launcher is None:
            return False
        with contextlib.suppress(psutil.Error):
            return self._launcher.ppid() != self._runner
        return False

    def _end_launcher(self) -> None:
        if self._kills_ranks and self._launcher is not None:
            with contextlib.suppress(psutil.Error):  # it has ended
                self._launcher.kill()


def is_runner(command: Sequence[str]) -> bool:
    """Return whether this is the command line of an interpreter that runs `deepspeed`."""
    return _script(command) in DEEPSPEED


def _script(command: Sequence[str]) -> str:
    """Return the name of the file or module that an interpreter with this command line runs."""
    return Path(next((word for word in command[1:] if not word.startswith("-")), "")).name

"""The processes above a rank that belong to its job: the launcher, which started it, and above that, if there is one, a
`deepspeed` runner.

`deepspeed` is two processes on the host where it is typed: the runner, which people see and signal, and below it the
launcher of the ranks. SIGTERM, for example, ends the runner alone. A shell belongs to no job, and neither does anything
further above: with nohup or setsid it is meant to go before the job does.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import psutil

from deca_ds.launch import Launch
from deca_ds.printing import print_wrapped
from deca_ds.watchdog.stop import StopByCommit, StopByStore

_SHELLS = ("sh", "ash", "bash", "busybox", "csh", "dash", "fish", "ksh", "tcsh", "zsh")
_RUNNERS = ("deepspeed", "deepspeed.py", "ds", "deepspeed.launcher.runner")
_RUNNER_GONE = "`deepspeed` is gone: the job saves a checkpoint and stops after this inner step"


class Ancestors:
    """The processes above this one, as they are when this object is made."""

    def __init__(self) -> None:
        self._parent, self._is_shell = os.getppid(), False
        self._launcher: psutil.Process | None = None
        self._runner: int | None = None
        with contextlib.suppress(psutil.Error):  # it is gone, or not ours to look at
            self._launcher = psutil.Process(self._parent)
            self._is_shell = self._launcher.name() in _SHELLS
            above = self._launcher.parent()
            if above is not None and is_runner(above.cmdline()):
                self._runner = above.pid

    def look(self, launch: Launch, stop: StopByStore | StopByCommit) -> str | None:
        """Return why this rank has to end, in words, if its launcher was killed. If only the runner is gone, have the
        job stop."""
        # a launcher or runner that was told to stop, as this rank was, may end before this rank is done
        if launch.launcher == "python" or stop.pending:
            return None
        if self.launcher_is_gone():
            return "the launcher is gone, so this rank stops"
        if self.runner_is_gone():
            if not launch.local_rank:
                print_wrapped(f"\n{_RUNNER_GONE}")
            stop.ask()
        return None

    def launcher_is_gone(self) -> bool:
        """Whether the launcher has ended, so that no process would collect this one."""
        return not self._is_shell and os.getppid() != self._parent

    def runner_is_gone(self) -> bool:
        """Whether there was a runner, and the launcher has outlived it."""
        if self._runner is None or self._launcher is None:
            return False
        with contextlib.suppress(psutil.Error):
            return self._launcher.ppid() != self._runner
        return False


def is_runner(command: Sequence[str]) -> bool:
    """Whether this is the command line of an interpreter that runs `deepspeed`."""
    script = next((word for word in command[1:] if not word.startswith("-")), "")
    return Path(script).name in _RUNNERS

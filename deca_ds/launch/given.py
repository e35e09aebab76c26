"""What the launcher was given, as far as the processes above this one tell: the hostfile, and the host of each rank.

Of the environment only the variables of schedulers name hosts. The deepspeed launcher trains on this host alone where
its hostfile is missing, and takes the number in front of what follows it, as in `slots=4x`; both are refused here.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from deca_ds.errors import LaunchError
from deca_ds.launch.allocation import scheduler_of
from deca_ds.launch.hostfile import read_hostfile
from deca_ds.plural import several

DEEPSPEED = ("deepspeed", "deepspeed.pt", "ds", "deepspeed.launcher.runner")
_MPIRUN = ("mpirun", "mpiexec", "orterun", "prterun")
_HOSTFILE = ("-H", "-hostfile", "--hostfile", "-machinefile", "--machinefile")
_WORLD_INFO = "--world_info="
_SCRIPT, _CLI, _COMMAND = "train.py", "deca", "train"
_NO_CONFIGURATION = ("--local_rank", "--local-rank", "--dry-run", "--join")


@dataclass(frozen=True)
class Command:
    """A process's command line and the folder that it runs in."""

    words: Sequence[str]
    folder: str

    def names(self, programs: Sequence[str]) -> bool:
        """Return whether the launcher runs one of them, by itself or by an interpreter."""
        return any(Path(word).name in programs for word in self.words[:4])


@dataclass(frozen=True)
class Given:
    """hostfile: of deepspeed or mpirun, None where neither has got one that is known. hosts: of each rank, () where
    nobody tells. by_deepspeed: whether that launcher reads the hostfile."""

    hostfile: Path | None = None
    hosts: tuple[str, ...] = ()
    by_deepspeed: bool = False

    @classmethod
    def of(cls, above: Sequence[Command]) -> Given:
        """Find the launcher above this process. above: this process's parent, its parent, and so on."""
        hosts = next((found for command in above if (found := _hosts_of_ranks(command.words))), ())
        for command in above:
            by_deepspeed = command.names(DEEPSPEED)
            if (by_deepspeed or command.names(_MPIRUN)) and (name := _hostfile(command.words)) is not None:
                return cls(Path(command.folder, name), hosts, by_deepspeed)
        return cls(hosts=hosts)

    def check(self, ranks: int) -> None:
        """Raise LaunchError where deepspeed has made something else of its hostfile than was meant."""
        if self.hostfile is None or not self.by_deepspeed:
            return
        if self.hostfile.is_file():
            read_hostfile(self.hostfile)
        elif str(self.hostfile) != os.devnull and set(self.hosts) == {"localhost"}:
            raise LaunchError(
                f"deepspeed was given the hostfile {str(self.hostfile)!r}, which is not there, and so started "
                f"{several(ranks, 'rank')} on this host alone",
                where="deepspeed --hostfile",
                fix="check the path; to train on this host alone leave --hostfile out",
            )

    def host(self, rank: int) -> str:
        """Name a rank in a message: `rank 3 on n1`, as far as the host is known."""
        return f"rank {rank}" + (f" on {self.hosts[rank]}" if rank < len(self.hosts) else "")

    def doctor(self, configuration: Sequence[str] = ()) -> str:
        """Return the command that looks at the hosts, or also at what a configuration needs there."""
        if self.hostfile is None and set(self.hosts) == {"localhost"}:
            return f"`{shlex.join(['deca', 'doctor', *configuration])}` looks at this host"
        scheduler = scheduler_of(os.environ)
        if self.hostfile is None and scheduler is not None:
            command = shlex.join(["deca", "doctor", *configuration])
            return f"`{command}` in a {scheduler} job on the same hosts looks at every one of them"
        words = ["deca", "doctor", "--hostfile", str(self.hostfile or "HOSTS"), *configuration]
        return f"`{shlex.join(words)}` looks at every host"


def given() -> Given:
    """Return what was given to the launcher of this process."""
    return Given.of(list(_above()))


def look_at_hosts(fix: str) -> str:
    """Extend `fix`, for a failure of hosts or of what is between them, with the command that looks for the cause."""
    return f"{fix}. {given().doctor()}"


def look_for_files() -> str:
    """Return the command that looks for what the configuration of this process names on every host of the job."""
    return given().doctor(_configuration(sys.argv))


def _configuration(words: Sequence[str]) -> Sequence[str]:
    """Return the trainer's arguments that say what is trained. words: of this process, whose script may be the user's
    own."""
    program, arguments = Path(words[0]).name, list(words[1:])
    if program == _CLI and arguments[:1] == [_COMMAND]:
        del arguments[0]
    elif program != _SCRIPT:
        return ["--config", "RUN.yaml"]
    return [word for word in arguments if not word.startswith(_NO_CONFIGURATION)]


def _above() -> Iterator[Command]:
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process().parents():
            with contextlib.suppress(psutil.Error):  # another user's, or one that has just ended
                yield Command(process.cmdline(), process.cwd())


def _hostfile(words: Sequence[str]) -> str | None:
    """Return the hostfile among the launcher's own arguments, which end where the script begins."""
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if word.endswith(".py") and index > 1:
            return None
        if name in _HOSTFILE:
            return value if equals else next(iter(words[index + 1 :]), None)
    return None


def _hosts_of_ranks(words: Sequence[str]) -> tuple[str, ...]:
    """Return the host of each rank, from the arguments that deepspeed's launcher gives to its process on each host."""
    for word in words:
        if word.startswith(_WORLD_INFO):
            with contextlib.suppress(ValueError, binascii.Error, AttributeError):
                slots = json.loads(base64.urlsafe_b64decode(word[len(_WORLD_INFO) :]))
                return tuple(host for host, ids in slots.items() for _ in ids)
    return ()

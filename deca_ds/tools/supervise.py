"""`deca supervise mpirun ... launchers/train.py ...`: start a job again when it ends before its run does.

A launcher that ends all ranks together (mpirun, srun, deepspeed) ends with the first client that dies; the next start
continues from the newest checkpoint that all have. So a dead client comes back by a new start of all of them. A rank
that was started by itself, in a job that continues without its client, is started again with --join.

    the run has finished, or the supervisor was told to stop   it ends with the exit code of the last start
    a mistake: exit code 2 before anything was ever trained    the same, for there is something to mend first
    it has diverged: it would do so again                      the same
    some stopped because others are gone                       starts the job again, like one that has failed
    `restarts` starts in a row have brought nothing new        it gives up, with that exit code

A launcher may lose the exit code of its ranks. What these have told (watchdog/failure.py), and the marker of a job's
end in the run's folder, go before it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from deca_ds.checkpoint.done import ended, is_done, stopped_without
from deca_ds.checkpoint.steps import steps_in
from deca_ds.config import Config, load_config
from deca_ds.config.arguments import chosen
from deca_ds.config.checks import check_world
from deca_ds.config.resume import tells_divergence
from deca_ds.errors import USER_ERROR_CODE, ConfigError, LaunchError, in_words
from deca_ds.launch import ClientLayout, read_launch
from deca_ds.printing import print_wrapped
from deca_ds.run_folder import CHECKPOINTS, CLIENT_FAILED, DONE, FAILED, STOPPED, numbered
from deca_ds.tools.train_arguments import parser as train_parser
from deca_ds.training.terminal import on_stop
from deca_ds.watchdog.failure import EXIT_CODES, told_exit_codes
from deca_ds.watchdog.heartbeats import Heartbeat, read_heartbeats
from deca_ds.watchdog.restart import JOIN
from deca_ds.watchdog.stop import forget_request, is_requested, request_stop

_HANDS_ON = ("mpirun", "mpiexec", "prterun", "srun")  # launchers that pass SIGUSR1 to all ranks
_LONGEST_PAUSE_S = 120.0
_LOOK_S = 0.5  # between two looks at whether a signal is to be handed on
_INTERRUPTED = "interrupted: the job saves a checkpoint and stops; Ctrl-C again ends it at once"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--restarts",
        type=int,
        default=5,
        metavar="N",
        help="give up after N restarts in a row without a newer checkpoint (default 5)",
    )
    parser.add_argument(
        "--pause",
        type=float,
        default=5.0,
        metavar="S",
        help="wait S seconds before the first such restart, then twice as long each time (default 5)",
    )
    parser.add_argument("job", nargs=argparse.REMAINDER, metavar="LAUNCHER ...", help="the command that starts the job")


def run(arguments: argparse.Namespace) -> int:
    """See the module's text; returns the exit code. Raises UserError where the job could not be started again."""
    command = arguments.job[1:] if arguments.job[:1] == ["--"] else arguments.job
    config = configuration_of(command)
    client = None
    if "RANK" in os.environ and config.cluster.on_failure == "continue":
        launch = read_launch()
        client = ClientLayout.of(check_world(config, launch.world_size)).client_of(launch.rank)
    else:
        check_resumes(config)
    supervisor = Supervisor(command, Path(config.run.output), client, arguments.restarts, arguments.pause)
    on_stop(supervisor.stop)
    signal.signal(signal.SIGINT, supervisor.stop)
    return supervisor.run()


def configuration_of(command: Sequence[str]) -> Config:
    """Read the configuration of the job from its command line."""
    script = _script(command)
    if script is None:
        raise LaunchError(
            f"no training script in {' '.join(command)!r}",
            where="deca supervise",
            fix="give it the whole command: deca supervise mpirun -n 8 python launchers/train.py --config ...",
        )
    arguments = train_parser(command[script]).parse_intermixed_args(command[script + 1 :])
    return load_config(*chosen(arguments))


def _script(command: Sequence[str]) -> int | None:
    """Return the place of the word before the trainer's own arguments: the training script, or the second word of
    `deca train`. None if a command line has neither."""
    for place, word in enumerate(command):
        if word.endswith(".py"):
            return place
        if Path(word).name == "deca" and command[place + 1 : place + 2] == ["train"]:
            return place + 1
    return None


def check_resumes(config: Config) -> None:
    """Raise ConfigError unless a new start continues the run, from checkpoints that the run saves."""
    if config.run.resume == "never":
        raise ConfigError(
            "run.resume = 'never': a new start would be refused", where="run.resume", fix="set run.resume=auto"
        )
    if config.checkpoint.every == 0:
        raise ConfigError(
            "checkpoint.every = 0: a job that has failed has nothing to continue from",
            where="checkpoint.every",
            fix="set it to the number of inner steps that a failure may cost",
        )


@dataclass
class Supervisor:
    """command: starts the job, whose run.output is `output`, or one rank of it, of `client`, which then joins the
    others again. restarts, pause_s: see `add_arguments`."""

    command: Sequence[str]
    output: Path
    client: int | None
    restarts: int
    pause_s: float

    @property
    def joins(self) -> bool:
        """Whether it is one rank."""
        return self.client is not None

    def __post_init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._begun = False  # what `_has_trained` has found
        self._told = False  # no Event: a signal handler must not wait for a lock that it has interrupted
        self._handed_on = False  # whether a rank has been asked to stop
        self._missed = False  # whether there was none to be asked

    @property
    def _hands_on(self) -> bool:
        return Path(self.command[0]).name in _HANDS_ON

    def stop(self, number: int, *_: Any) -> None:
        """Have the job save a checkpoint and stop, or end it at the second SIGINT; a signal handler."""
        again, self._told = self._told, True
        if number == signal.SIGINT and again:
            self._end_at_once()
            return
        if number == signal.SIGINT:
            with contextlib.suppress(OSError):  # not print: it may be what has been interrupted
                os.write(2, f"\ndeca supervise: {_INTERRUPTED}\n".encode())
        self._hand_on()

    def run(self) -> int:
        """Start the job, again and again where it may be; return the exit code of the last start."""
        vain, command = 0, list(self.command)
        while True:
            before, failures, ends, started = self._reached(), self._failures(), self._ends(), time.monotonic()
            code, told = self._start(command)
            reached = self._reached()
            if code and self._ends() - ends and not self._failures() - failures:
                code = 0
            elif code and told == {USER_ERROR_CODE}:
                code = USER_ERROR_CODE
            if self._told or self._is_through(code):
                return code
            if diverged := [marker for marker, _ in self._failures() - failures if tells_divergence(marker)]:
                self._say(f"not started again: it would diverge again. {diverged[0]} says what to change first")
                return code or USER_ERROR_CODE
            vain = 0 if reached > before else vain + 1
            what, place = ("this rank", "inner") if self.joins else ("the job", "newest checkpoint: inner")
            after = f"{what} ended with {code} after {time.monotonic() - started:.0f} s, before the run did; "
            after += f"{place} step {max(0, reached)}"
            if vain > self.restarts:
                self._say(f"{after}. Giving up: {vain} starts in a row have brought nothing new")
                return code or 1
            pause_s = min(self.pause_s * 2 ** max(0, vain - 1), _LONGEST_PAUSE_S)
            again = f" ({vain} of {self.restarts} that bring nothing new)" if vain else ""
            self._say(f"{after}. Starting it again in {pause_s:g} s{again}")
            if self._wait(pause_s):
                return code
            if self.joins and JOIN not in command:
                command.append(JOIN)

    def _ends(self) -> set[tuple[Path, int]]:
        """Return the markers of a job that has ended in order, with their times; none for a rank that joins by itself,
        which may end before the job."""
        return set() if self.joins else _with_times(self.output / name for name in (DONE, STOPPED))

    def _failures(self) -> set[tuple[Path, int]]:
        """Return the markers of failures in the run's folder, with their times. Of the markers of single clients, a
        rank that joins by itself looks at its own alone."""
        of_clients = numbered(self.output, CLIENT_FAILED).items()
        job = (self.output / FAILED,) if ended(self.output) == FAILED else ()
        return _with_times((*job, *(marker for client, marker in of_clients if self.client in (None, client))))

    def _wait(self, seconds: float) -> bool:
        """Wait; returns whether a signal has asked this process to stop meanwhile."""
        deadline = time.monotonic() + seconds
        while not self._told and time.monotonic() < deadline:
            time.sleep(0.1)
        return self._told

    def _start(self, command: Sequence[str]) -> tuple[int, set[int]]:
        """Run the job; returns the launcher's exit code, and those of the ranks of this host that have failed.

        The launcher gets a session of its own: Ctrl-C, which a terminal sends to all processes of a command, and the
        loss of the terminal would have mpirun kill its ranks, and `deepspeed` leave its job, or end all on its hosts.
        """
        with tempfile.TemporaryDirectory(prefix="deca_supervise_", ignore_cleanup_errors=True) as folder:
            codes = Path(folder) / "codes"
            environment = os.environ | {EXIT_CODES: str(codes)}
            try:
                self._process = subprocess.Popen(command, env=environment, start_new_session=True)
            except OSError as error:
                fix = "give the command as the shell would start it, and look for its program in PATH"
                raise LaunchError(
                    f"cannot start {command[0]!r}: {in_words(error)}", where="deca supervise", fix=fix
                ) from None
            code = self._wait_for_end(self._process)
            self._process = None
            if self._told:
                forget_request(self.output)  # one that came after the end
            return code if code >= 0 else 128 - code, told_exit_codes(codes)  # as a shell has it

    def _wait_for_end(self, process: subprocess.Popen[bytes]) -> int:
        """Wait for the launcher, and hand on a signal that has found no launcher, or a launcher that had not started
        its ranks yet."""
        while True:
            if self._told and not self._handed_on:
                self._hand_on()
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(_LOOK_S)

    def _is_through(self, code: int) -> bool:
        """Return whether the job must not be started again."""
        if code == 0:
            return self.joins or is_done(self.output) or not stopped_without(self.output)
        # nobody to join, or a mistake
        return (self.joins or code == USER_ERROR_CODE) and not self._has_trained()

    def _reached(self) -> int:
        """Return the inner steps done so far, of which the next start has to do more."""
        return self._trained() if self.joins else self._newest_checkpoint()

    def _has_trained(self) -> bool:
        """Return whether a rank of this host has ever trained, or was about to when others would have continued without
        it. A rank that comes back says neither before it is let in."""
        self._begun |= self._newest_checkpoint() >= 0 or any(beat.step or beat.outlived for beat in self._beats())
        return self._begun

    def _trained(self) -> int:
        """Return the furthest inner step of this host's ranks."""
        return max((beat.step for beat in self._beats()), default=0)

    def _beats(self) -> list[Heartbeat]:
        """Read the heartbeats of this host's ranks or, of a rank that joins by itself, of its client: the others train
        on when it cannot."""
        return [beat for beat in read_heartbeats(self.output) if self.client in (None, beat.client)]

    def _newest_checkpoint(self) -> int:
        """Return the step of the newest checkpoint of which a rank of this host has a part, complete or not, or -1."""
        return max(steps_in(self.output / CHECKPOINTS), default=-1)

    def _hand_on(self) -> None:
        """Ask the job to stop by SIGUSR1, for which one rank is enough. SIGTERM would end mpirun's ranks at once, and
        deepspeed before its job. Where none is on this host, ask through the run's folder, as `deca stop` does."""
        if self._process is None:
            return
        if self._hands_on:
            self._signal(signal.SIGUSR1)
            self._handed_on = True
            return
        for rank in self._ranks(self._process.pid):
            with contextlib.suppress(psutil.Error):
                rank.send_signal(signal.SIGUSR1)
                self._handed_on = True
        if self._handed_on:
            return
        if not self._missed:
            self._missed = True
            launcher = Path(self.command[0]).name
            self._say(f"{launcher} has no rank on this host: asking through {self.output}, as soon as the job has it")
        with contextlib.suppress(OSError):  # it is not there yet; a job that takes it forgets what was asked before
            if not is_requested(self.output):
                request_stop(self.output)

    def _end_at_once(self) -> None:
        """End the job without a checkpoint: kill the launcher's ranks on this host, or interrupt the launcher."""
        ranks = [] if self._process is None or self._hands_on else self._ranks(self._process.pid)
        for rank in ranks:
            with contextlib.suppress(psutil.Error):
                rank.kill()
        if not ranks:
            self._signal(signal.SIGINT)

    def _signal(self, number: signal.Signals) -> None:
        """Send the launcher a signal."""
        if self._process is not None:
            with contextlib.suppress(psutil.Error):
                psutil.Process(self._process.pid).send_signal(number)

    def _ranks(self, pid: int) -> list[psutil.Process]:
        """Return process `pid` and its descendants on this host, as far as they run the training script."""
        found = []
        with contextlib.suppress(psutil.Error):
            for process in (top := psutil.Process(pid), *top.children(recursive=True)):
                with contextlib.suppress(psutil.Error, ValueError):  # one that has just ended
                    interpreter, *words = process.cmdline()
                    if Path(interpreter).name.startswith("python") and self.runs_trainer(words):
                        found.append(process)
        return found

    def runs_trainer(self, words: Sequence[str]) -> bool:
        """Return whether an interpreter with these arguments runs what the job's command names."""
        place, of = _script(self.command), next((place for place, word in enumerate(words) if word[:1] != "-"), None)
        if place is None or of is None:
            return False
        if self.command[place] == "train":
            return _script(words) == of + 1
        return words[of] == self.command[place]

    @staticmethod
    def _say(what: str) -> None:
        print_wrapped(f"deca supervise: {what}")


def _with_times(markers: Iterable[Path]) -> set[tuple[Path, int]]:
    """Return the markers that exist, with their times. Another host may remove one at any time."""
    found = set()
    for marker in markers:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found.add((marker, marker.stat().st_mtime_ns))
    return found

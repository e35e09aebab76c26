"""`deca stop RUN`: have the job that writes to this folder save a checkpoint and stop, wherever its ranks are.

exit code 0   it has stopped, or was through
exit code 1   it has failed meanwhile
exit code 2   there is no such run
exit code 4   no rank gives a sign of life
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from deca_ds.config.paths import argument as path_argument
from deca_ds.errors import CheckpointError, in_words
from deca_ds.printing import print_wrapped
from deca_ds.tools.status import STOPPED_CODE, WELL, State, look, told_end, watch
from deca_ds.watchdog.stop import forget_request, is_requested, request_stop


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=path_argument, help="the run's output folder")


def run(arguments: argparse.Namespace) -> int:
    """Ask, wait until the job has ended, and say how; returns the exit code of the module's text. Raises
    CheckpointError for a folder that is no run's, and where this user cannot ask the job."""
    folder: Path = arguments.run
    state = look(folder)
    if state.is_over:
        print_wrapped(f"nothing to stop: {_how(state)}", sys.stdout)
        return _code(state)
    _ask(folder)
    print_wrapped("asked; the job stops after its inner step, or the evaluation that is under way")
    state = watch(folder, lambda state: None if state.is_over else _ask(folder))
    if state.marker is not None:
        forget_request(folder)  # one that came after the end
    print_wrapped(_how(state), sys.stdout)
    return _code(state)


def _ask(folder: Path) -> None:
    """Ask the job, unless it is asked already. A job that takes the folder meanwhile, as after a death, forgets what
    the one before was asked."""
    try:
        if not is_requested(folder):
            request_stop(folder)
    except OSError as error:
        raise CheckpointError(
            f"the job cannot be asked: {in_words(error)}", where=str(folder), fix="ask as who started the job"
        ) from error


def _how(state: State) -> str:
    silent = "no rank gives a sign of life; if the job was killed, the same command with run.resume=auto continues it"
    return told_end(state) or silent


def _code(state: State) -> int:
    return WELL if state.code == STOPPED_CODE else state.code

"""The commands for what a run has left, which its end names."""

from __future__ import annotations

import shlex
from pathlib import Path

from deca_ds.training.scores import MEAN_MODEL

BEST, NEWEST = "best", "newest"  # for deca export --checkpoint
_HOW_IT_ENDED = "how the job ended: the launcher's exit code may be that of a lost client"


def next_commands(run: Path, clients: int, *, best: bool = False, lost: bool = False) -> str:
    """Name commands for a run that is done, a line each. clients: of the run. best: whether there is a checkpoint of
    the best evaluation. lost: whether the launcher has seen ranks fail without which the others continued."""
    folder = shlex.quote(str(run))
    return (
        f"  deca status {folder}          {_HOW_IT_ENDED}\n"
        * lost
        + f"  deca report {folder}          a page of what happened\n"
        f"  deca export {folder} MODEL    the {MEAN_MODEL if clients > 1 else 'model'} as a folder for from_pretrained"
        + f" (the best one: --checkpoint {BEST})"
        * best
    )


def stopped_commands(run: Path, *, best: bool, lost: bool) -> str:
    """Name what to do with a run that has stopped, besides continuing it. best, lost: as for `next_commands`."""
    folder, which = shlex.quote(str(run)), BEST if best else NEWEST
    export = f"  deca export {folder} MODEL --checkpoint {which}    "
    return f"{f'  deca status {folder}':{len(export)}}{_HOW_IT_ENDED}\n" * lost + f"{export}its {which} model so far"

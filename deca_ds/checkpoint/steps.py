"""The checkpoints of a run: a folder for each step, of which every rank writes, reads and removes its own part.

    <run>/checkpoints/step_00000123/client_003/rank_001/     as in write_shards.py

There is no commit of the whole: a checkpoint counts if every rank of the job finds its part whole, and that is asked
when a run resumes (open_steps.py). So nobody waits for another host to write, and no file system needs to be shared.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from deca_ds.checkpoint.part import PARTIAL, Part
from deca_ds.run_folder import RANK, STEP, numbered


def step_folder(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` inner steps."""
    return folder / STEP.format(step)


def steps_in(folder: Path) -> list[int]:
    """Return the steps that there are folders of, whole or not, ascending."""
    return list(numbered(folder, STEP))


def remove_part(folder: Path, step: int, own: Part) -> None:
    """Remove what a rank answers for: with k ranks, the parts of rank, rank + k, ..., whoever wrote them."""
    here = step_folder(folder, step)
    of_client = own.folder(here).parent
    for name in (RANK, RANK + PARTIAL):
        for rank, path in numbered(of_client, name).items():
            if rank % own.ranks == own.rank:
                shutil.rmtree(path)
    with contextlib.suppress(OSError):  # the others' parts are still there, or another rank was first
        of_client.rmdir()
        here.rmdir()


def remove_newer(folder: Path, step: int, own: Part) -> None:
    """Remove what a rank answers for, see `remove_part`, of all checkpoints after `step`."""
    for newer in steps_in(folder):
        if newer > step:
            remove_part(folder, newer, own)

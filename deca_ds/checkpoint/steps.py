"""The checkpoints of a run: a folder for each step, of which every rank writes, reads and removes its own part.

    <run>/checkpoints/step_00000123/client_003/rank_001/     as in write_shards.py

There is no commit of the whole: a checkpoint counts if every rank of the job finds its part whole, and that is asked
when a run resumes. So nobody waits for another host to write, and no file system needs to be shared.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path

from deca_ds.checkpoint.shards import ShardedModel
from deca_ds.checkpoint.write_shards import MANIFEST, rank_folder
from deca_ds.errors import CheckpointError

FOLDER = "checkpoints"  # in a run's folder


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` inner steps is."""
    return folder / f"step_{step:08d}"


def steps_in(folder: Path) -> list[int]:
    """The steps that there are folders of, whole or not, ascending."""
    found = (re.fullmatch(r"step_(\d{8,})", path.name) for path in folder.glob("step_*"))
    return sorted(int(match[1]) for match in found if match)


def open_checkpoint(folder: Path, step: int, *, client: int, rank: int, ranks: int) -> ShardedModel:
    """What `rank` of the client's `ranks` needs of a checkpoint, every file of it verified.

    Written by as many ranks, it is this rank's own part, and only that must be here. Else it is the whole client's.
    Raises CheckpointError if a part is missing or damaged or comes from another attempt at the run.
    """
    here = step_folder(folder, step)
    has_own = (rank_folder(here, client, rank) / MANIFEST).is_file()
    saved = ShardedModel(here, [client], [rank] if has_own else None)
    if has_own and saved.ranks[client] != ranks:
        saved = ShardedModel(here, [client])
    attempts = {state.get("attempt") for state in saved.states.values()}
    if saved.step != step or len(attempts) != 1:
        raise CheckpointError("its parts are not from one attempt at the run", where=str(here))
    saved.verify()
    return saved


def find_checkpoint(folder: Path, step: int | None = None, client: int | None = None) -> ShardedModel:
    """The model in the checkpoint after `step` inner steps, or in the newest that is complete here: of one client, or
    of all that were in when it was saved.

    Raises CheckpointError if there is none, or a part is missing or comes from another attempt at the run.
    """
    steps = steps_in(folder)
    if not steps or step not in (None, *steps):
        raise CheckpointError(
            "there is no checkpoint" + ("" if step is None else f" after inner step {step}"),
            where=str(folder),
            fix=f"there are those after inner step {', '.join(map(str, steps))}"
            if steps
            else "a run saves them with checkpoint.every, or when it is told to stop",
        )
    refused: CheckpointError | None = None
    for candidate in reversed(steps) if step is None else [step]:
        try:
            return _whole(step_folder(folder, candidate), client)
        except CheckpointError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def _whole(here: Path, client: int | None) -> ShardedModel:
    """With the clients that were in."""
    there = sorted(int(path.name.removeprefix("client_")) for path in here.glob("client_*"))
    state = next(iter(ShardedModel(here, there[:1] if client is None else [client]).states.values()))
    missing = state.get("missing", ())
    saved = ShardedModel(here, None if client is None else [client], without=missing, model_only=True)
    if len({each.get("attempt") for each in saved.states.values()}) != 1:
        raise CheckpointError("its parts are not from one attempt at the run", where=str(here))
    return saved


def remove_part(folder: Path, step: int, *, client: int, rank: int, ranks: int) -> None:
    """Remove what `rank` answers for: with k ranks, the parts of rank, rank + k, ..., whoever wrote them."""
    here = step_folder(folder, step)
    for path in here.glob(f"client_{client:03d}/rank_*"):
        number = re.match(r"rank_(\d+)", path.name)
        if number and int(number[1]) % ranks == rank:
            shutil.rmtree(path)
    with contextlib.suppress(OSError):  # the others' parts are still there, or another rank was first
        (here / f"client_{client:03d}").rmdir()
        here.rmdir()


def remove_newer(folder: Path, step: int, *, client: int, rank: int, ranks: int) -> None:
    """Remove what `rank` answers for, see `remove_part`, of all checkpoints after `step`."""
    for newer in steps_in(folder):
        if newer > step:
            remove_part(folder, newer, client=client, rank=rank, ranks=ranks)

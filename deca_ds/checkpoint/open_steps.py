"""Reading the checkpoints of a run (steps.py): a rank's own part, or a whole one."""

from __future__ import annotations

from pathlib import Path

from deca_ds.checkpoint.part import Part
from deca_ds.checkpoint.shards import ShardedModel
from deca_ds.checkpoint.steps import step_folder, steps_in
from deca_ds.checkpoint.write_shards import MANIFEST
from deca_ds.errors import CheckpointError
from deca_ds.run_folder import CLIENT, numbered


def open_checkpoint(folder: Path, step: int, own: Part) -> ShardedModel:
    """Open what a rank needs of a checkpoint, and verify every file of it.

    Written by as many ranks, it is this rank's own part, and only that must be here. Else it is the whole client's.
    Raises CheckpointError if a part is missing or damaged or comes from another attempt at the run.
    """
    return open_part(step_folder(folder, step), step, own)


_ONE_ATTEMPT = "copy all of it from one attempt, or name an older checkpoint"


def open_part(here: Path, step: int, own: Part) -> ShardedModel:
    """Open what is in the folder `here` as `open_checkpoint` does. Raises CheckpointError."""
    has_own = (own.folder(here) / MANIFEST).is_file()
    saved = ShardedModel(here, [own.client], [own.rank] if has_own else None)
    if has_own and saved.ranks[own.client] != own.ranks:
        saved = ShardedModel(here, [own.client])
    attempts = {state.get("attempt") for state in saved.states.values()}
    if saved.step != step or len(attempts) != 1:
        raise CheckpointError("its parts are not from one attempt at the run", where=str(here), fix=_ONE_ATTEMPT)
    saved.verify()
    return saved


def find_checkpoint(folder: Path, step: int | None = None, client: int | None = None) -> ShardedModel:
    """Open the model in the checkpoint after `step` inner steps, or in the newest that is complete here: of one client,
    or of all that were in when it was saved.

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
    """Open the checkpoint in the folder `here`: of `client`, or of all clients that took part when it was saved."""
    there = list(numbered(here, CLIENT))
    state = next(iter(ShardedModel(here, there[:1] if client is None else [client]).states.values()))
    missing = state.get("missing", ())
    saved = ShardedModel(here, None if client is None else [client], without=missing, model_only=True)
    if len({each.get("attempt") for each in saved.states.values()}) != 1:
        raise CheckpointError("its parts are not from one attempt at the run", where=str(here), fix=_ONE_ATTEMPT)
    return saved

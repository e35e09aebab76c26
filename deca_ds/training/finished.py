"""What is to be done in the folder of a run that has begun: nothing, or to go on, maybe with another length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deca_ds.checkpoint.done import inner_steps, is_done
from deca_ds.checkpoint.slices import MANIFEST
from deca_ds.config import Config
from deca_ds.errors import CheckpointError
from deca_ds.training.length import count_rounds, one_block, too_short
from deca_ds.training.starts import read_starts


def look_at_run(config: Config) -> dict[str, Any]:
    """JSON-able: rounds, of the run from here on; finished: it was DONE; ends: it is to be no longer than that.

    On the host of the first rank, before anything is loaded. Raises UserErrors for a length that the run cannot get.
    """
    output, starts = Path(config.run.output), read_starts(Path(config.run.output))
    rounds = _wanted(config, starts)
    if not is_done(output):
        return {"rounds": rounds, "finished": False, "ends": False}
    blocks = len(_blocks(output, starts))
    before = inner_steps(output) // (blocks * config.algorithm.inner_steps)
    if rounds < before:
        raise too_short(before, rounds, "rounds")
    if rounds > before:
        if blocks == 1:
            raise one_block()
        _check_state(output / "model")
    return {"rounds": rounds, "finished": True, "ends": rounds == before}


def _wanted(config: Config, starts: list[dict[str, Any]]) -> int:
    """Rounds. algorithm.epochs that the run was started with come to what they came to then, whoever has come since."""
    if config.algorithm.rounds is not None:
        return config.algorithm.rounds
    output = Path(config.run.output)
    for start in reversed(starts):
        if start.get("epochs") == config.algorithm.epochs and "rounds" in start:
            return int(start["rounds"])
    try:
        rows = [client["train"] for client in json.loads((output / "data.json").read_text())]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise _unreadable(output / "data.json", str(error)) from error
    return count_rounds(config, len(_blocks(output, starts)), rows)


def _blocks(output: Path, starts: list[dict[str, Any]]) -> list[Any]:
    try:
        blocks: list[Any] = starts[-1]["model"]["blocks"]
    except (LookupError, TypeError):
        raise _unreadable(output / "starts.json", "it does not tell the model's blocks") from None
    return blocks


def _unreadable(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"cannot tell how long the run is: {why}",
        where=str(path),
        fix="bring the file back; a run that has not finished takes algorithm.rounds, too",
    )


def _check_state(model: Path) -> None:
    """Raise CheckpointError for a model without what a longer run needs, as far as there is one on this host."""
    for manifest in model.glob(f"client_*/rank_*/{MANIFEST}"):
        try:
            keeps_state = bool(json.loads(manifest.read_text())["state"])
        except (OSError, ValueError, LookupError, TypeError):  # it will be refused as a checkpoint
            continue
        if not keeps_state:
            raise CheckpointError(
                "the run was finished by an earlier version of deca_ds, which kept nothing to go on from",
                where=str(manifest),
                fix="start a new run from the exported model (deca export), in a new folder",
            )

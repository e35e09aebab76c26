"""Putting the state of a checkpoint back, and forgetting what came after it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from deca_ds.checkpoint.part import Part
from deca_ds.checkpoint.shards import ShardedModel
from deca_ds.checkpoint.steps import remove_newer
from deca_ds.engine.slices import Slice
from deca_ds.engine.state import Scope, TrainingState, Value
from deca_ds.errors import CheckpointError, in_words
from deca_ds.launch.world import Cluster
from deca_ds.run_folder import CHECKPOINTS, CLIENT, DATA, MODEL, client_metrics, job_metrics
from deca_ds.training.resume import Resumption


def rewind(output: Path, cluster: Cluster, done: int) -> None:
    """Forget what was logged after `done` inner steps, and slices of the trained model that the run saves again.

    An evaluation comes after the checkpoint of its step, so that it is repeated. A client that dies does so after the
    newest checkpoint that has its part. Its parts of newer ones are removed.
    """
    remove_newer(output / CHECKPOINTS, done, Part(cluster.client, cluster.shard, cluster.ranks))
    if cluster.is_leader:
        rewind_lines(client_metrics(output, cluster.client), done)
        shutil.rmtree(output / MODEL / CLIENT.format(cluster.client), ignore_errors=True)
    if cluster.is_job_leader:
        rewind_lines(job_metrics(output), done)
    if cluster.ranks > 1:
        dist.barrier()


def rewind_lines(path: Path, done: int) -> None:
    """Leave out, in a file of metrics, what a run that continues after `done` inner steps will write again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:  # the line that a killed process was writing
            break
        if record["step"] <= done - (record["kind"] != "step"):
            kept.append(line)
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)


def compare_with_saved(output: Path, summaries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Raise CheckpointError unless every client trains on as much data as before, as far as counts can tell. Returns
    what is to be saved: those of clients that were not there before come to it."""
    path = output / DATA
    try:
        before = {summary["client"]: summary for summary in json.loads(path.read_text())}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(
            f"cannot tell which data the run was started with: {in_words(error)}",
            where=str(path),
            fix="bring the file back, from the host of the run's first rank",
        ) from error
    for new in summaries:
        client = new["client"]
        old = before.setdefault(client, new)
        for key in new.keys() - {"own_evaluation", "common_evaluation"}:
            if old.get(key) != new[key]:
                raise CheckpointError(
                    f"client {client} has other data than before: {key} was {old.get(key)}, is {new[key]}",
                    where=str(path),
                    fix="give the run the data that it was started with",
                )
    return [before[client] for client in sorted(before)]


def save_summaries(output: Path, summaries: Sequence[dict[str, Any]]) -> None:
    """Write data.json: of every client that was there, ClientData.summary."""
    (output / DATA).write_text(json.dumps(summaries, indent=2) + "\n")


def restore(resumption: Resumption, cluster: Cluster, state: TrainingState) -> None:
    """Put the saved state back, including that of a block in the middle of its activation.

    With another number of ranks each reads the elements that it holds now, from whoever wrote them; the random state is
    then a new one. Raises CheckpointError for a checkpoint of another model. The schedule has been compared, see
    `check_place` of length.py.
    """
    saved, values = resumption.saved, resumption.state
    if saved is None or values is None:
        return
    read = _Reader(saved, values, cluster.client)
    for piece in state.pieces():
        if not isinstance(piece, Value):
            for part in piece.slices(cluster.shard, cluster.ranks):
                part.fill(read.slice(part))
        elif piece.scope is Scope.RANK and not resumption.same_layout:
            piece.anew()
        elif piece.scope is not Scope.ATTEMPT:
            piece.set(read.value(piece.name))


class _Reader:
    """Reads one client's slices, of tensors in the shape that they have now, and its values; all must be there."""

    def __init__(self, saved: ShardedModel, values: dict[str, Any], client: int):
        self._saved, self._values, self._client = saved, values, client
        self._names = set(saved.names)

    def slice(self, part: Slice) -> Tensor:
        """Read the elements of a slice. Raises CheckpointError if the parameter is missing or has another shape."""
        found = self._saved.shape(part.name) if part.name in self._names else None
        if found != part.shape:
            what = f"{part.name} has shape {part.shape}, in the checkpoint {found or 'it is missing'}"
            raise self._lacks(what, "model")
        return self._saved.read_range(part.name, self._client, part.start, part.stop)

    def value(self, name: str) -> Any:
        """Return a value. Raises CheckpointError if it is missing."""
        if name not in self._values:
            raise self._lacks(f"the value {name!r} is missing in the checkpoint", "version of deca_ds")
        return self._values[name]

    def _lacks(self, what: str, wanted: str) -> CheckpointError:
        fix = f"resume with the {wanted} that the run was started with"
        return CheckpointError(what, where=str(self._saved.folder), fix=fix)

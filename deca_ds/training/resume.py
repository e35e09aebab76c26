"""Going on from a checkpoint: which one all ranks can use, and putting its state back."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from deca_ds.checkpoint.shards import ShardedModel
from deca_ds.checkpoint.slices import MANIFEST, PARTIAL, rank_folder
from deca_ds.checkpoint.steps import FOLDER, open_checkpoint, remove_part, step_folder, steps_in
from deca_ds.config import Config
from deca_ds.engine.slices import Slice
from deca_ds.engine.state import Scope, TrainingState, Value
from deca_ds.errors import CheckpointError
from deca_ds.gossip import subset
from deca_ds.gossip.schedule import MixingSchedule
from deca_ds.launch import Cluster, Launch
from deca_ds.launch.launcher import ClientLayout
from deca_ds.launch.store import JobStore
from deca_ds.training.checkpoints import mixing_digest


@dataclass(frozen=True)
class Resumption:
    """What a run goes on from.

    step: inner steps done, 0 where there was no checkpoint yet. saved: what this rank reads. state: what it, or another
    rank of its client, had put into the manifest. same_layout: there are as many ranks as then.
    """

    step: int = 0
    saved: ShardedModel | None = None
    state: dict[str, Any] | None = None
    same_layout: bool = True

    @property
    def place(self) -> dict[str, int]:
        """In the schedule, see `position` of deca_ds/engine/state.py."""
        assert self.state is not None
        at: dict[str, int] = self.state["schedule"]
        return at


def choose(config: Config, launch: Launch, store: JobStore, layout: ClientLayout, mixing: MixingSchedule) -> Resumption:
    """The newest checkpoint that every rank that is started finds whole, and that was saved with all clients but those
    of cluster.absent; all ranks call this, before anything else.

    Newer ones are named on stderr, with the reason, and removed: the run comes to their steps again. If none can be
    used and none had ever been complete, run.resume=auto begins anew. Raises CheckpointError if there is none that all
    can use, or if the mixing matrices are others than they were.
    """
    folder = Path(config.run.output) / FOLDER
    client = layout.client_of(launch.rank)
    own = {"client": client, "rank": layout.shard_of(launch.rank), "ranks": len(layout.ranks_of(client))}
    seen = store.gather(launch, "resume/seen", steps_in(folder))
    refused: list[str] = []
    earlier: set[int | None] = set()  # the newest that was complete when these were written
    written = False  # whether any rank has a part of them, whole or not
    for step in sorted({step for steps in seen.values() for step in steps}, reverse=True):
        saved, answer = _try(folder, step, own, config.cluster.absent)
        answers = store.gather(launch, f"resume/{step}", answer)
        attempts = {answer.get("attempt") for answer in answers.values()}
        if len(attempts) == 1 and None not in attempts:
            assert saved is not None
            same = saved.ranks[client] == own["ranks"]
            state = saved.states[client, own["rank"] if same else 0]
            _refuse_other_mixing(state, mixing)
            at = state["schedule"]
            verdict = f"going on after inner step {at['done']} of {at['of']}: {saved.folder}"
            _leave_behind(Path(config.run.output), step, own, launch, refused, verdict)
            return Resumption(step, saved, state, same)
        earlier |= {answer["earlier"] for answer in answers.values() if "earlier" in answer}
        written |= any(answer.get("written", True) for answer in answers.values())
        failing = next((rank for rank, answer in answers.items() if "reason" in answer), None)
        reason = "ranks hold it from different attempts" if failing is None else answers[failing]["reason"]
        refused.append(f"step {step}: {'' if failing is None else f'rank {failing}: '}{reason}")
    if (written and earlier != {None}) or config.run.resume == "require":
        raise CheckpointError(
            "there is no checkpoint that all ranks can use" + "".join(f"\n  {line}" for line in refused),
            where=str(folder),
            fix="start anew in a new folder; without a common file system, every rank needs the part that it wrote",
        )
    verdict = "no checkpoint was complete before: starting anew" if refused else ""
    _leave_behind(Path(config.run.output), 0, own, launch, refused, verdict)
    return Resumption()


def keep_model(output: Path, *, client: int, rank: int, ranks: int) -> None:
    """Make the trained model of a finished run a checkpoint of its last step, where there is none: it is all that is
    left of the state then. A rank answers for the parts of `rank`, `rank` + `ranks`, ..., see `remove_part`.

    Raises CheckpointError if that cannot be.
    """
    for part in sorted((output / "model" / f"client_{client:03d}").glob("rank_*")):
        if part.suffix == PARTIAL or int(part.name.removeprefix("rank_")) % ranks != rank:
            continue
        try:
            step = json.loads((part / MANIFEST).read_text())["step"]
            kept = step_folder(output / FOLDER, step) / part.parent.name / part.name
            if not kept.exists():
                partial = kept.with_name(kept.name + PARTIAL)
                shutil.rmtree(partial, ignore_errors=True)
                shutil.copytree(part, partial, copy_function=_link)
                partial.rename(kept)
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise CheckpointError(f"the trained model cannot be gone on from: {error}", where=str(part)) from error


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def _try(
    folder: Path, step: int, own: dict[str, int], absent: Collection[int]
) -> tuple[ShardedModel | None, dict[str, Any]]:
    """The checkpoint and its attempt, or None and why this rank cannot use it."""
    try:
        saved = open_checkpoint(folder, step, **own)
    except CheckpointError as error:
        written = rank_folder(step_folder(folder, step), own["client"], own["rank"]).exists()
        return None, {"reason": f"{error.what} ({error.where})", "written": written}
    except (OSError, SafetensorError) as error:
        return None, {"reason": f"{error} ({step_folder(folder, step)})"}
    state = next(iter(saved.states.values()))
    if missing := [client for client in state.get("missing", ()) if client not in absent]:
        return None, {"reason": f"it was saved without client {', '.join(map(str, missing))}"}
    return saved, {key: state[key] for key in ("attempt", "earlier") if key in state}


def _leave_behind(
    output: Path, step: int, own: dict[str, int], launch: Launch, refused: list[str], verdict: str
) -> None:
    """Remove this rank's parts of checkpoints after `step` and how the last attempt ended; say so."""
    _remove_newer(output, step, **own)
    for marker in (output / "FAILED", output / "STOPPED", *output.glob("FAILED_client_*")):
        marker.unlink(missing_ok=True)
    if launch.rank == launch.first:
        for line in refused:
            print(f"WARNING: a checkpoint cannot be used and is removed, {line}", file=sys.stderr)
        if verdict:
            print(verdict, file=sys.stderr, flush=True)


def _remove_newer(output: Path, step: int, **own: int) -> None:
    for newer in (found for found in steps_in(output / FOLDER) if found > step):
        remove_part(output / FOLDER, newer, **own)


def _refuse_other_mixing(state: dict[str, Any], mixing: MixingSchedule) -> None:
    if state["mixing"] != mixing_digest(subset.without(mixing, state.get("missing", ()))):
        raise CheckpointError(
            "the mixing matrices are not those that the run was started with",
            where="gossip.matrix, gossip.edges",
            fix="give the run its own files",
        )


def rewind(output: Path, cluster: Cluster, done: int) -> None:
    """Forget what was logged after `done` inner steps, and slices of the trained model that the run saves again.

    An evaluation comes after the checkpoint of its step, so that it is repeated. A client that dies does so after the
    newest checkpoint that has its part. Its parts of newer ones are removed.
    """
    _remove_newer(output, done, client=cluster.client, rank=cluster.shard, ranks=cluster.ranks)
    if cluster.is_leader:
        _rewind_lines(output / "metrics" / f"client_{cluster.client:03d}.jsonl", done)
        shutil.rmtree(output / "model" / f"client_{cluster.client:03d}", ignore_errors=True)
    if cluster.is_job_leader:
        _rewind_lines(output / "metrics" / "job.jsonl", done)
    dist.barrier()


def _rewind_lines(path: Path, done: int) -> None:
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


def compare_with_saved(output: Path, summaries: list[dict[str, Any]]) -> None:
    """Raise CheckpointError unless every client trains on as much data as before, as far as counts can tell; note those
    of clients that were not there before."""
    path = output / "data.json"
    before = {summary["client"]: summary for summary in json.loads(path.read_text())}
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
    save_summaries(output, [before[client] for client in sorted(before)])


def save_summaries(output: Path, summaries: Sequence[dict[str, Any]]) -> None:
    """Write data.json: of every client that was there, ClientData.summary."""
    (output / "data.json").write_text(json.dumps(summaries, indent=2) + "\n")


def restore(resumption: Resumption, cluster: Cluster, state: TrainingState) -> None:
    """Put the saved state back, of a block amid its turn, too.

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
    """Reads what must be there of one client: slices of tensors in the shape that they have now, and values."""

    def __init__(self, saved: ShardedModel, values: dict[str, Any], client: int):
        self._saved, self._values, self._client = saved, values, client
        self._names = set(saved.names)

    def slice(self, part: Slice) -> Tensor:
        found = self._saved.shape(part.name) if part.name in self._names else None
        if found != part.shape:
            what = f"{part.name} has shape {part.shape}, in the checkpoint {found or 'it is missing'}"
            raise self._lacks(what, "model")
        return self._saved.read_range(part.name, self._client, part.start, part.stop)

    def value(self, name: str) -> Any:
        if name not in self._values:
            raise self._lacks(f"the value {name!r} is missing in the checkpoint", "version of deca_ds")
        return self._values[name]

    def _lacks(self, what: str, wanted: str) -> CheckpointError:
        fix = f"resume with the {wanted} that the run was started with"
        return CheckpointError(what, where=str(self._saved.folder), fix=fix)

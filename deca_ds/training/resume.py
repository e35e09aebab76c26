"""What a run continues from: what has begun in its folder, how long it is to be from here on, and the checkpoint that
all ranks can use."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from deca_ds.checkpoint.done import inner_steps, is_done
from deca_ds.checkpoint.open_steps import open_part
from deca_ds.checkpoint.part import PARTIAL, Part, rank_folders
from deca_ds.checkpoint.shards import ShardedModel
from deca_ds.checkpoint.steps import remove_newer, step_folder, steps_in
from deca_ds.checkpoint.write_shards import MANIFEST
from deca_ds.config import Config
from deca_ds.config.resume import check_folder, has_begun, save_changes
from deca_ds.errors import CheckpointError, in_words
from deca_ds.gossip import MixingSchedule, subset
from deca_ds.launch import Launch
from deca_ds.launch.store import JobStore
from deca_ds.plural import named
from deca_ds.printing import print_wrapped
from deca_ds.run_folder import (
    CHECKPOINTS,
    CLIENT_FAILED,
    DATA,
    DONE,
    FAILED,
    MODEL,
    RANK,
    STARTS,
    STOPPED,
    numbered,
)
from deca_ds.training.checkpoints import mixing_digest
from deca_ds.training.claim import check_free
from deca_ds.training.length import count_rounds, one_block, too_short
from deca_ds.training.start_log import read_starts


@dataclass(frozen=True)
class Resumption:
    """What a run continues from.

    step: inner steps done, 0 where there was no checkpoint yet. saved: what this rank reads. state: what it, or another
    rank of its client, had put into the manifest. same_layout: there are as many ranks as then. refused: newer
    checkpoints, each with the reason.
    """

    step: int = 0
    saved: ShardedModel | None = None
    state: dict[str, Any] | None = None
    same_layout: bool = True
    refused: Sequence[str] = ()

    @property
    def place(self) -> dict[str, int]:
        """In the schedule, see `position` of deca_ds/engine/state.py."""
        assert self.state is not None
        at: dict[str, int] = self.state["schedule"]
        return at


def look_at_output(config: Config) -> dict[str, Any] | None:
    """Return what the first rank's host knows of the run that is to continue in run.output; None if none has begun.
    JSON-able. rounds: of the run from here on. blocks: their number, None if nothing tells it. finished: whether it was
    DONE. ends: whether it is to be no longer than that.

    Loads nothing. Raises UserErrors for a folder that is not what run.resume wants, see `check_folder`, and for a
    length that the run cannot get.
    """
    check_folder(config)
    begun = config.run.resume != "never" and has_begun(Path(config.run.output))
    return _look_at_run(config) if begun else None


def check_start(config: Config) -> None:
    """Raise the UserError with which a start would refuse run.output before it loads anything; changes nothing."""
    begun = look_at_output(config)
    if begun is None or not begun["ends"]:
        check_free(Path(config.run.output))


def _look_at_run(config: Config) -> dict[str, Any]:
    output, starts = Path(config.run.output), read_starts(Path(config.run.output))
    rounds = _wanted(config, starts)
    if not is_done(output):
        with suppress(CheckpointError):
            return {"rounds": rounds, "blocks": len(_blocks(output, starts)), "finished": False, "ends": False}
        return {"rounds": rounds, "blocks": None, "finished": False, "ends": False}
    blocks = len(_blocks(output, starts))
    before = inner_steps(output) // (blocks * config.algorithm.inner_steps)
    if rounds < before:
        raise too_short(before, rounds, "rounds")
    if rounds > before:
        if blocks == 1:
            raise one_block()
        _check_state(output / MODEL)
    return {"rounds": rounds, "blocks": blocks, "finished": True, "ends": rounds == before}


def _wanted(config: Config, starts: list[dict[str, Any]]) -> int:
    """Return the number of rounds. If algorithm.epochs is as at an earlier start, so are the rounds, whichever clients
    have come since."""
    if config.algorithm.rounds is not None:
        return config.algorithm.rounds
    output = Path(config.run.output)
    for start in reversed(starts):
        if start.get("epochs") == config.algorithm.epochs and "rounds" in start:
            return int(start["rounds"])
    try:
        rows = [client["train"] for client in json.loads((output / DATA).read_text())]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise _unreadable(output / DATA, in_words(error)) from error
    return count_rounds(config, len(_blocks(output, starts)), rows)


def _blocks(output: Path, starts: list[dict[str, Any]]) -> list[Any]:
    try:
        blocks: list[Any] = starts[-1]["model"]["blocks"]
    except (LookupError, TypeError):
        raise _unreadable(output / STARTS, "it does not name the model's blocks") from None
    return blocks


def _unreadable(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"cannot tell how long the run is: {why}",
        where=str(path),
        fix="bring the file back; a run that has not finished takes algorithm.rounds, too",
    )


def _check_state(model: Path) -> None:
    """Raise CheckpointError if a trained model on this host lacks the state that a longer run needs."""
    for manifest in (folder / MANIFEST for folder in rank_folders(model)):
        try:
            keeps_state = bool(json.loads(manifest.read_text())["state"])
        except (OSError, ValueError, LookupError, TypeError):  # it will be refused as a checkpoint
            continue
        if not keeps_state:
            raise CheckpointError(
                "the run was finished by an earlier version of deca_ds, which kept nothing to continue from",
                where=str(manifest),
                fix="start a new run from the exported model (deca export), in a new folder",
            )


def choose(
    config: Config, launch: Launch, store: JobStore, own: Part, mixing: MixingSchedule, *, finished: bool = False
) -> Resumption:
    """Choose the newest checkpoint that every started rank finds whole, and that was saved with all clients but those
    of cluster.absent. All ranks call this, before anything else. Changes nothing. own: what this rank saves.
    finished: the run is done, so that its trained model is one of them.

    If none can be used and none had ever been complete, run.resume=auto begins anew. Raises CheckpointError if there is
    none that all can use, or if the mixing matrices are others than they were.
    """
    folder = Path(config.run.output) / CHECKPOINTS
    places = _places(Path(config.run.output), own, finished=finished)
    seen = store.gather(launch, "resume/seen", sorted(places))
    refused: list[str] = []
    earlier: set[int | None] = set()  # the newest that was complete when these were written
    written = False  # whether any rank has a part of them, whole or not
    for step in sorted({step for steps in seen.values() for step in steps}, reverse=True):
        saved, answer = _try(places.get(step, step_folder(folder, step)), step, own, config.cluster.absent)
        answers = store.gather(launch, f"resume/{step}", answer)
        attempts = {answer.get("attempt") for answer in answers.values()}
        if len(attempts) == 1 and None not in attempts:
            assert saved is not None
            same = saved.ranks[own.client] == own.ranks
            state = saved.states[own.client, own.rank if same else 0]
            _refuse_other_mixing(state, mixing)
            return Resumption(step, saved, state, same, refused)
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
    return Resumption(refused=refused)


def keep_model(output: Path, own: Part) -> None:
    """Make the trained model of a finished run a checkpoint of its last step, where there is none: it is all that is
    left of the state then. A rank does so with the parts that it answers for, see `remove_part` of checkpoint/steps.py.

    Raises CheckpointError if that cannot be; then nothing is left of it.
    """
    made: list[Path] = []
    try:
        for rank, part in numbered(own.folder(output / MODEL).parent, RANK).items():
            if rank % own.ranks == own.rank:
                _keep(part, output / CHECKPOINTS, made)
    except BaseException:
        for folder in made:
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # others' parts are there
                for above in folder.parents[:3]:  # the client's, the step's, that of all checkpoints
                    above.rmdir()
        raise


def _keep(part: Path, folder: Path, made: list[Path]) -> None:
    try:
        step = json.loads((part / MANIFEST).read_text())["step"]
        kept = step_folder(folder, step) / part.parent.name / part.name
        if not kept.exists():
            partial = kept.with_name(kept.name + PARTIAL)
            shutil.rmtree(partial, ignore_errors=True)
            made += [partial, kept]
            shutil.copytree(part, partial, copy_function=_link)
            partial.rename(kept)
    except (OSError, ValueError, LookupError, TypeError) as error:
        fix = "look at the folder's permissions and disk; start anew, in a new folder, where a file is damaged"
        raise CheckpointError(
            f"the run cannot continue from its trained model: {in_words(error, named=True)}", where=str(part), fix=fix
        ) from error


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def _places(output: Path, own: Part, *, finished: bool) -> dict[int, Path]:
    """Return the folder of each checkpoint that is here, by its step."""
    places = {step: step_folder(output / CHECKPOINTS, step) for step in steps_in(output / CHECKPOINTS)}
    for part in numbered(own.folder(output / MODEL).parent, RANK).values() if finished else ():
        with suppress(OSError, ValueError, LookupError, TypeError):  # it will be missed
            places.setdefault(int(json.loads((part / MANIFEST).read_text())["step"]), output / MODEL)
    return places


def _try(here: Path, step: int, own: Part, absent: Collection[int]) -> tuple[ShardedModel | None, dict[str, Any]]:
    """Return the checkpoint in the folder `here` and its attempt, or None and why this rank cannot use it."""
    try:
        saved = open_part(here, step, own)
    except CheckpointError as error:
        return None, {"reason": f"{error.what} ({error.where})", "written": own.folder(here).exists()}
    except (OSError, SafetensorError) as error:
        return None, {"reason": f"{in_words(error)} ({here})"}
    state = next(iter(saved.states.values()))
    if missing := [client for client in state.get("missing", ()) if client not in absent]:
        return None, {"reason": f"it was saved without {named('client', missing)}"}
    return saved, {key: state[key] for key in ("attempt", "earlier") if key in state}


def leave_behind(config: Config, resumption: Resumption, launch: Launch, store: JobStore, own: Part) -> None:
    """Note in the run's folder that nothing refuses to continue any more: the first rank writes what is new in the
    configuration; each removes its parts of newer checkpoints than the one that was chosen, as the run comes to their
    steps again, and how the last attempt ended. The first names what it removes, and where the run continues. All ranks
    call this, and may write to the folder then."""
    output = Path(config.run.output)
    if launch.rank == launch.first and has_begun(output) and (changed := save_changes(config)):
        print_wrapped(f"continuing with {changed}")
    remove_newer(output / CHECKPOINTS, resumption.step, own)
    ends = (output / name for name in (DONE, STOPPED, FAILED))
    for marker in (*ends, *numbered(output, CLIENT_FAILED).values()):
        marker.unlink(missing_ok=True)
    store.gather(launch, "output/left_behind", None)  # or one rank would remove what another one says of its failure
    if launch.rank != launch.first:
        return
    for line in resumption.refused:
        print_wrapped(f"WARNING: a checkpoint cannot be used and is removed, {line}")
    if resumption.saved is not None:
        at = resumption.place
        verdict = f"continuing after inner step {at['done']} of {at['of']}: {resumption.saved.folder}"
        print_wrapped(verdict)
    elif resumption.refused:
        print_wrapped("no checkpoint was complete before: starting anew")


def _refuse_other_mixing(state: dict[str, Any], mixing: MixingSchedule) -> None:
    if state["mixing"] != mixing_digest(subset.without(mixing, state.get("missing", ()))):
        raise CheckpointError(
            "the mixing matrices are not those that the run was started with",
            where="gossip.matrix, gossip.edges",
            fix="give the run its own files",
        )

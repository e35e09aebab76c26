"""Saves everything that a run needs to continue exactly where it was, while training continues.

A rank's checkpoint holds its part of what deca_ds/engine/state.py lists: tensors in files, a group in each file, and
values in the manifest. At the end of an inner step the rank copies them to the host, one copy at a time, and a thread
writes them. The files of blocks that have not been trained since the oldest of the kept checkpoints are links to the
files of that one, which is removed when the new one is complete: so the kept ones share no file, and damage to one of
them leaves the others whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from deca_ds.checkpoint.links import Links, link_files
from deca_ds.checkpoint.part import Part
from deca_ds.checkpoint.steps import remove_part, step_folder, steps_in
from deca_ds.checkpoint.write_shards import file_name, save_shards
from deca_ds.config.monitoring import CheckpointConfig
from deca_ds.engine.slices import Slice
from deca_ds.engine.state import FROZEN, Piece, Scope, TrainingState, Value
from deca_ds.errors import CheckpointError
from deca_ds.gossip import MixingSchedule
from deca_ds.gossip.gossip import Gossip
from deca_ds.launch.world import Cluster
from deca_ds.printing import print_wrapped
from deca_ds.training.completion import Completion
from deca_ds.training.divergence import diverged

_LOOKS, _LOOK_S = 10, 0.2  # at whether the others have written a checkpoint, too, when a run ends

Groups = list[tuple[str, list[Slice]]]


class Checkpoints:
    """Saves this rank's part of a run's checkpoints and keeps the newest complete ones, and with checkpoint.best the
    last complete one of those that were the best.

    state: what is saved, as it stands. completion: which checkpoints all ranks have written. attempt: number of this
    attempt at the run, the same on all ranks. timeout_s: cluster.timeout_s. resumed: the step that it continued from.
    check: called before anything is saved; raises an error for a state that must not be.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        cluster: Cluster,
        state: TrainingState,
        gossip: Gossip,
        completion: Completion,
        *,
        folder: Path,
        attempt: int,
        timeout_s: float,
        resumed: int | None = None,
        check: Callable[[], None] = lambda: None,
    ):
        self._config, self._cluster, self._state = config, cluster, state
        self._own = Part(cluster.client, cluster.shard, cluster.ranks)
        self._gossip, self._completion = gossip, completion
        self.folder, self._attempt = folder, attempt
        self._resumed, self._timeout_s, self._check = resumed, timeout_s, check
        self._saved: list[int] = [] if resumed is None else [resumed]
        self._bests: list[int] = [state.best["step"]] if config.best and state.best else []
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._write_under_way: Future[None] | None = None
        self._told = False  # that there are no hard links

    def after_step(self) -> None:
        """Save if it is time to; raise CheckpointError if the write that is under way has failed."""
        if self._write_under_way is not None and self._write_under_way.done():
            self.wait()
        if self._config.every and self._state.done % self._config.every == 0:
            self.save()

    def save(self, *, best: bool = False) -> None:
        """Copy the state and have it written; waits for the write before it, if need be. best: see checkpoint.best."""
        done = self._state.done
        if best:
            self._bests.append(done)
        if done in self._saved:
            return
        self._check()
        self._cluster.progress.enter("saving a checkpoint", works=True)
        self.wait()
        with contextlib.ExitStack() as unless_copied:
            unless_copied.callback(self._remove, done)
            links = self._link(done)
            groups, manifest = self._groups(links), self.manifest()
            unless_copied.pop_all()
        self._saved.append(done)
        self._completion.begin(done)
        self._write_under_way = self._thread.submit(self._write, done, groups, manifest, links)

    def wait(self) -> None:
        """Return when nothing is being written. Raises CheckpointError if the write has failed or makes no progress."""
        if self._write_under_way is not None:
            pending, self._write_under_way = self._write_under_way, None
            progress = self._cluster.progress
            progress.tick()
            while pending not in wait([pending], _LOOK_S).done:
                if time.monotonic() - progress.moved > self._timeout_s:  # bytes that are written count as moving on
                    raise CheckpointError(
                        f"a checkpoint is not written: nothing has moved for {self._timeout_s:g} s",
                        where=str(self.folder),
                        fix="look at the disk; if it is only slow, raise cluster.timeout_s",
                    )
            pending.result()

    def newest(self) -> int | None:
        """Return the newest step that all ranks have saved, as far as this one can learn it within a few seconds."""
        with contextlib.suppress(CheckpointError, RuntimeError):  # the disk, or the job's store, is gone
            self.wait()
            for again in range(_LOOKS):
                if again and self._saved:
                    time.sleep(_LOOK_S)
                if self._saved and self._complete(self._saved[-1]):
                    return self._saved[-1]
            return next((step for step in reversed(self._saved) if self._complete(step)), None)
        return None

    def wait_for_all(self) -> None:
        """Return when all ranks of all clients have written the checkpoint of the state as it stands, the last one."""
        self._cluster.progress.enter("saving a checkpoint", works=True)
        self.wait()
        self._cluster.progress.enter("saving: waiting for all ranks")
        if self._state.done != self._resumed:
            self._completion.wait(self._state.done)
            self._remove_old()  # the checkpoint that was kept until all ranks had written this one

    def forget(self) -> None:
        """Remove this rank's part of what this attempt has saved and of what it continued from: the run is done."""
        for step in set(self._saved) - self._best():
            self._remove(step)
        with contextlib.suppress(OSError):  # there are others
            self.folder.rmdir()

    def _link(self, done: int) -> Links:
        """Link the files of slices that have not changed. The main thread does this, not the one that writes, because
        slices whose files cannot be linked have to be copied now."""
        if len(self._saved) < self._config.keep or self._saved[-self._config.keep] in self._best():
            return Links()  # the best one stays
        base, cluster = self._saved[-self._config.keep], self._cluster
        trained = self._state.schedule.trained(base, done)
        labels = [*(block.label for block in self._state.client.plan.blocks), FROZEN]
        links = link_files(
            step_folder(self.folder, done),
            step_folder(self.folder, base),
            [file_name(index, label) for index, label in enumerate(labels) if index not in trained],
            self._own,
        )
        if links.refused and not self._told and cluster.is_job_leader:
            self._told = True
            told = "every checkpoint is written whole: cannot link its files to those of an earlier one"
            print_wrapped(f"WARNING: {told}: {links.refused}")
        return links

    def _groups(self, links: Links) -> Groups:
        """Copy all slices that are not in linked files to the host."""
        return [
            (label, [] if file_name(index, label) in links.files else [piece.copy() for piece in slices])
            for index, (label, slices) in enumerate(slice_groups(self._state.pieces(), self._cluster))
        ]

    def manifest(self) -> dict[str, Any]:
        """Return the values of the state as it stands, for the manifest: all that is no tensor."""
        values = (piece for piece in self._state.pieces() if isinstance(piece, Value))
        return {
            "attempt": self._attempt,
            "missing": list(self._cluster.members.missing),
            "mixing": mixing_digest(self._gossip.schedule),
            **{value.name: value.get() for value in values if value.scope is not Scope.ATTEMPT},
        }

    def _write(self, done: int, groups: Groups, manifest: dict[str, Any], links: Links) -> None:
        self._remove_old()  # by now all ranks have written what this one wrote before
        manifest["earlier"] = max((step for step in self._saved if step != done and self._complete(step)), default=None)
        need = sum(piece.nbytes for _, slices in groups for piece in slices)
        try:
            save_shards(
                step_folder(self.folder, done),
                groups,
                self._own,
                clients=self._cluster.clients,
                step=done,
                state=manifest,
                linked=links.files,
            )
        except CheckpointError as error:
            free = shutil.disk_usage(self.folder.parent).free
            raise CheckpointError(
                f"{error.what}; this rank's checkpoint takes {need / 1e6:.1f} MB, {free / 1e6:.1f} MB are free",
                where=error.where,
                fix="make room (checkpoint.keep, too, says how many there are) and continue with run.resume=require: "
                "earlier checkpoints are as they were",
            ) from error
        self._completion.add(done)
        self._remove_old()

    def _remove_old(self) -> None:
        kept = [step for step in self._saved if self._complete(step)][-self._config.keep :]
        if len(kept) == self._config.keep:
            for step in set(steps_in(self.folder)) - self._best():
                if step < kept[0] and not self._completion.keeps(step):
                    self._remove(step)

    def _best(self) -> set[int]:
        """Return the steps of the last complete checkpoint that was the best, and of those after it."""
        complete = [place for place, step in enumerate(self._bests) if self._complete(step)]
        self._bests = self._bests[complete[-1] if complete else 0 :]
        return set(self._bests)

    def _remove(self, step: int) -> None:
        remove_part(self.folder, step, self._own)

    def _complete(self, step: int) -> bool:
        return step == self._resumed or self._completion.complete(step)


def slice_groups(pieces: Iterable[Piece], cluster: Cluster) -> Iterator[tuple[str, Iterator[Slice]]]:
    """Yield this rank's slices of those pieces of the state that are tensors, in a group each.

    Raises DivergedError for values that are not finite: the last look at what is to be saved.
    """
    for piece in pieces:
        if not isinstance(piece, Value):
            cluster.progress.tick()
            yield piece.label, _finite(piece.slices(cluster.shard, cluster.ranks))


def _finite(slices: Iterable[Slice]) -> Iterator[Slice]:
    for piece in slices:
        # the sum is a cheap check; the exact one is needed only if the sum is not finite, which large values cause too
        if not piece.values.sum().isfinite() and not piece.values.isfinite().all():
            raise diverged("the model", f"{piece.name} is not finite", "saving")
        yield piece


def mixing_digest(mixing: MixingSchedule) -> str:
    """Return a digest by which sequences of mixing matrices are told apart."""
    return hashlib.blake2b(b"".join(matrix.tobytes() for matrix in mixing.matrices), digest_size=16).hexdigest()

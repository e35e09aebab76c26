"""Whether all ranks have written a checkpoint: counted in the job's store, or agreed on where clients may die."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Protocol

from deca_ds.elastic import Question, SurvivorCommit
from deca_ds.errors import CheckpointError
from deca_ds.launch.progress import EVERYBODY
from deca_ds.launch.world import Cluster


class Completion(Protocol):
    """Which checkpoints, by their steps, all ranks have written, and which must stay."""

    def begin(self, step: int) -> None:
        """Note that this rank is about to write the checkpoint of `step`."""
        ...

    def add(self, step: int) -> None:
        """Note that this rank has written the checkpoint of `step`; the thread that writes calls this."""
        ...

    def complete(self, step: int) -> bool:
        """Return whether all ranks have written the checkpoint, as far as this one knows."""
        ...

    def keeps(self, step: int) -> bool:
        """Return whether the checkpoint has to stay, however many newer ones there are."""
        ...

    def wait(self, step: int) -> None:
        """Return when all ranks have written it. Raises CheckpointError if they do not."""
        ...


class CompletionByStore:
    """Counts in the job's store, to which every rank adds one for each checkpoint that it has written."""

    def __init__(self, cluster: Cluster, attempt: int, timeout_s: float):
        self._cluster, self._attempt, self._timeout_s = cluster, attempt, timeout_s
        self._store = cluster.store.reconnect()  # a connection of its own: the thread's waits must not block others

    def begin(self, step: int) -> None:
        """See Completion."""

    def add(self, step: int) -> None:
        """See Completion."""
        self._store.add(self._key(step), 1)

    def complete(self, step: int) -> bool:
        """See Completion."""
        return self._store.add(self._key(step), 0) == self._cluster.launch.world_size

    def keeps(self, step: int) -> bool:
        """See Completion."""
        return False

    def wait(self, step: int) -> None:
        """See Completion."""
        progress = self._cluster.progress
        progress.wait_for(EVERYBODY)
        deadline = time.monotonic() + progress.deadline_s(self._timeout_s)
        while not self.complete(step):
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"not all ranks have saved step {step}",
                    where="cluster.timeout_s",
                    fix="look at the output and the disks of the others; where they are slow, raise it",
                )
            time.sleep(0.05)
        progress.wait_for(None)

    def _key(self, step: int) -> str:
        return f"checkpoint/{self._attempt}/{step}"


class CompletionByCommit:
    """Asks at every agreement (elastic/survivor_commit.py) whether all ranks have written: all of them are at the same
    inner step there, so that the same checkpoint is each one's last. Complete means that all survivors have written it.

    A run is resumed with all its clients but those of cluster.absent, so the newest checkpoint from before the first
    death has to stay, and newer ones that the dead may have written.
    """

    def __init__(self, commit: SurvivorCommit, resumed: int | None, absent: Collection[int] = ()):
        self._commit, self._absent = commit, frozenset(absent)
        self._whole = resumed  # the newest that all clients but the absent are known to have written
        self._begun_by_all: set[int] = set()  # newer ones that they have begun, with no client missing since
        self._perhaps: set[int] = set()  # newer ones during which a client may have died
        self._before = self._begun = self._written = self._complete = -1
        self._all_have = False  # at the last agreement
        commit.also_ask(Question(lambda: self._written == self._begun, self._heard))

    def begin(self, step: int) -> None:
        """See Completion. Whoever begins one has written the one before it."""
        self._before, self._begun = self._begun, step
        if not self._one_is_missing:
            self._begun_by_all.add(step)

    @property
    def _one_is_missing(self) -> bool:
        return not self._absent.issuperset(self._commit.members.missing)

    def add(self, step: int) -> None:
        """See Completion."""
        self._written = step

    def complete(self, step: int) -> bool:
        """See Completion."""
        return step <= self._complete

    def keeps(self, step: int) -> bool:
        """See Completion."""
        return step == self._whole or step in self._begun_by_all | self._perhaps

    def wait(self, step: int) -> None:
        """See Completion."""
        # at least once: a rejoined client does not know what the others had agreed on before
        self._commit.run(lambda: None)
        while not self._all_have:
            time.sleep(0.05)
            self._commit.run(lambda: None)

    def _heard(self, all_have: bool) -> None:
        self._all_have = all_have
        written = self._begun if all_have else self._before
        self._complete = max(self._complete, written)
        if self._one_is_missing:
            self._perhaps |= self._begun_by_all
            self._begun_by_all = set()
        elif written in self._begun_by_all:
            self._whole, self._perhaps = written, set()
            self._begun_by_all = {step for step in self._begun_by_all if step > written}

"""One rank receives a request to stop, and all ranks stop after the same inner step.

A preemption reaches ranks at different moments, or only one of them, and clients may be steps apart. So:

1. The rank that receives the request (`ask`, a signal handler) notes it, and its watcher thread puts it into the job's
   store.
2. Every rank's watcher thread sees it there, closes its rank's gate and says how far the rank has to go: it is in an
   inner step that the other ranks of its client, and its neighbours, wait for.
3. All ranks stop at the furthest of these steps. The gates open up to there.

The ranks can agree before any of them reaches its gate, so a rank that waits for another one inside a step does not
block the agreement.

If no rank has begun an inner step by then, the ranks may end where they are, for example while they load.

A request may also come through the run's folder: the ranks look for a file there (`deca stop`).
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deca_ds.errors import AbsentError
from deca_ds.run_folder import STOP

if TYPE_CHECKING:
    from torch.distributed import Store

_ASKED, _TOLD, _AGREED = "stop/asked", "stop/told", "stop/agreed"
_NOWHERE = -1  # where a rank that does not train yet may end


def request_stop(run: Path) -> None:
    """Ask the job that writes to this folder to stop. Raises OSError if the request cannot be written."""
    (run / STOP).touch()


def is_requested(run: Path) -> bool:
    """Return whether the folder has a request to stop."""
    return (run / STOP).exists()


def forget_request(run: Path) -> None:
    """Remove a request that the ranks have seen, or that was meant for another job."""
    (run / STOP).unlink(missing_ok=True)


class StopByCommit:
    """Stops a job in which all ranks of all clients agree on every averaging anyway (elastic/survivor_commit.py): that
    agreement also asks whether any rank has a request to stop. All ranks learn it at the same inner step, and stop
    after it."""

    ends_early = False  # see StopByStore: the agreement is one of training

    def __init__(self) -> None:
        self._asked = self._agreed = False

    @property
    def pending(self) -> bool:
        """See StopByStore."""
        return self._asked or self._agreed

    @property
    def agreed(self) -> bool:
        """See StopByStore; another rank may learn it a moment later."""
        return self._agreed

    def let_end_early(self) -> None:
        """Do nothing: such a job does not end early."""

    def ask(self, *_: Any) -> None:
        """See StopByStore."""
        self._asked = True

    def may_pass(self, done: int) -> bool:
        """See StopByStore."""
        return not self._agreed

    def look(self, store: Store) -> None:
        """Do nothing: the store holds no request."""

    def answer(self) -> bool:
        """Return whether this rank may continue."""
        return not self._asked

    def heard(self, all_may: bool) -> None:
        """Note whether all ranks may continue."""
        self._agreed |= not all_may

    def stop(self) -> None:
        """Stop after this step; all ranks call this on their own."""
        self._agreed = True


class StopByStore:
    """Stops a job by notes in its store; this is the gate of one rank. `ask` and `may_pass` belong to the main thread,
    `look` to the watcher's."""

    def __init__(self, rank: int, world_size: int, timeout_s: float):
        self._rank, self._world_size, self._timeout_s = rank, world_size, timeout_s
        self._asked = False
        self._told = False
        self._agreed = False
        self.ends_early = False  # all ranks have agreed to stop, and none of them has trained
        self._may_end_early = False
        self._gate = threading.Condition()
        self._committed = 0  # inner steps that this rank will have done before it comes to its gate again
        self._last: int | None = None  # the gate opens for no more inner steps than this

    @property
    def pending(self) -> bool:
        """Whether the job is about to stop, as far as this rank knows."""
        return self._asked or self._last is not None

    @property
    def agreed(self) -> bool:
        """Whether all ranks know that the job is about to stop."""
        return self._agreed or (self._world_size == 1 and self._asked)

    def let_end_early(self) -> None:
        """Let `ends_early` become true when no rank trains yet. A rank at its gate then waits there to be ended."""
        self._may_end_early = True

    def ask(self, *_: Any) -> None:
        """Note a request to stop the whole job. This is a signal handler, which may interrupt the main thread anywhere,
        so it does no more."""
        self._asked = True

    def may_pass(self, done: int) -> bool:
        """Return whether to continue after `done` inner steps; if not, all ranks stop here. Waits while they agree.

        Raises AbsentError if they do not agree within the time limit.
        """
        if self._world_size == 1 and not (self._may_end_early and self._committed == 0):
            return not self._asked
        deadline = time.monotonic() + self._timeout_s
        with self._gate:
            while self._is_closed(done):
                if not self._gate.wait(timeout=1.0) and time.monotonic() > deadline:
                    raise AbsentError(
                        f"the ranks did not agree on where to stop within {self._timeout_s:g} s",
                        where=f"rank {self._rank}",
                        fix="look for a rank that hangs (deca status); if it is only slow, raise cluster.timeout_s",
                    )
            if self._last is not None and done >= self._last:
                return False
            self._committed = done + 1
            return True

    def _is_closed(self, done: int) -> bool:
        """Return whether the ranks have not agreed yet, or end early."""
        if self._world_size == 1:
            return self._asked
        return self._last is not None and done >= self._last and not self._agreed

    def look(self, store: Store) -> None:
        """Tell the other ranks what this one knows, and learn what they know; the watcher thread calls this
        regularly."""
        if self._agreed or self.ends_early:
            return
        if self._world_size == 1:
            with self._gate:
                self.ends_early = self._asked and self._may_end_early and self._committed == 0
            return
        if self._asked and not self._told:
            store.set(_ASKED, "1")
        if not self._told and store.check([_ASKED]):
            with self._gate:
                self._last = self._committed
            self._told = True
            early = self._may_end_early and self._last == 0
            store.set(f"{_TOLD}/{self._rank}", str(_NOWHERE if early else self._last))
            if store.add(_TOLD, 1) == self._world_size:
                furthest = max(int(store.get(f"{_TOLD}/{rank}")) for rank in range(self._world_size))
                store.set(_AGREED, str(furthest))
        if self._told and store.check([_AGREED]):
            with self._gate:
                furthest = int(store.get(_AGREED))
                self._last, self.ends_early = max(0, furthest), furthest == _NOWHERE
                self._agreed = not self.ends_early
                self._gate.notify_all()

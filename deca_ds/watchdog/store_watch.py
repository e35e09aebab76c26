"""Whether the job's store still answers.

A store whose host is stopped as a process, or out of reach without a word, takes questions and answers none, and
whoever asks waits for ever: torch's client has no deadline for most of them. So one thread asks and another one counts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from deca_ds.errors import StallError
from deca_ds.launch.progress import Progress

_LOOK_S = 1.0


class StoreWatch:
    """A thread that calls `too_long` once neither the store has answered nor this rank moved on for cluster.timeout_s.

    timeout_s: that holds until `progress` knows the configuration's. too_long: gets the seconds without progress and
    those without an answer; the thread ends after it. grace_s: gives the seconds that are granted beside.
    """

    def __init__(
        self,
        progress: Progress,
        timeout_s: float,
        too_long: Callable[[float, float], None],
        grace_s: Callable[[], float],
    ):
        self._progress, self._timeout_s, self._too_long, self._grace_s = progress, timeout_s, too_long, grace_s
        self._answers = 0
        self._over = threading.Event()
        threading.Thread(target=self._count, daemon=True).start()

    def answered(self) -> None:
        """The store has answered."""
        self._answers += 1

    def close(self) -> None:
        """Nobody asks this store any more."""
        self._over.set()

    def _count(self) -> None:
        seen, silent_s = 0, 0.0  # counted, not measured: this process may be stopped for a while itself
        while not self._over.wait(_LOOK_S):
            silent_s = silent_s + _LOOK_S if self._answers == seen else 0.0
            seen, idle_s = self._answers, time.monotonic() - self._progress.moved
            if min(silent_s, idle_s) > (self._progress.timeout_s or self._timeout_s) + self._grace_s():
                self._too_long(idle_s, silent_s)
                return


def no_answer(host: int, place: str, idle_s: float, silent_s: float) -> StallError:
    """For a rank that is at `place`. host: the rank whose store it is. idle_s, silent_s: see `too_long`."""
    return StallError(
        f"no progress for {idle_s:.0f} s, and no answer for {silent_s:.0f} s from the job's store, which rank {host} "
        "hosts",
        where=place,
        fix=f"look at rank {host}: it is stopped as a process, or its host is out of reach",
    )

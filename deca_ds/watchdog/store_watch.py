"""Whether the job's store still answers.

A store accepts requests and answers none when its host's process is stopped, or when packets to its host disappear.
Then a rank that asks waits for ever, because torch's client has no deadline for most requests. So one thread asks, and
another one counts the seconds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from deca_ds.errors import StallError
from deca_ds.launch.progress import Progress

_LOOK_S = 1.0


class StoreWatch:
    """A thread that calls `too_long` when for cluster.timeout_s the store has given no answer and this rank has made no
    progress.

    timeout_s: the limit until `progress` knows the configuration's. too_long: gets the seconds without progress and
    those without an answer; the thread ends after it. grace_s: gives seconds that are granted in addition.
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
        """Note that the store has answered."""
        self._answers += 1

    def close(self) -> None:
        """Stop watching: this rank asks the store no more."""
        self._over.set()

    def _count(self) -> None:
        seen, silent_s = 0, 0.0  # counted, not measured: this process itself may be stopped for a while
        while not self._over.wait(_LOOK_S):
            silent_s = silent_s + _LOOK_S if self._answers == seen else 0.0
            seen, idle_s = self._answers, time.monotonic() - self._progress.moved
            if min(silent_s, idle_s) > (self._progress.timeout_s or self._timeout_s) + self._grace_s():
                self._too_long(idle_s, silent_s)
                return


def no_answer(host: int, place: str, idle_s: float, silent_s: float) -> StallError:
    """Make the error for a rank at `place`. host: the rank whose store it is. idle_s, silent_s: see `too_long`."""
    return StallError(
        f"no progress for {idle_s:.0f} s, and no answer for {silent_s:.0f} s from the job's store, which rank {host} "
        "hosts",
        where=place,
        fix=f"look at rank {host}: its process is stopped, or its host is out of reach",
    )

"""Waiting for something that can only be asked about, such as a request of MPI."""

from __future__ import annotations

import time
from collections.abc import Callable

_SPIN_S = 2e-3  # before the first sleep; a sleep takes far longer than a chunk that is about to come
_SHORTEST_SLEEP_S, _LONGEST_SLEEP_S = 5e-5, 1e-3


def poll(done: Callable[[], bool], deadline: float) -> bool:
    """Call `done` until it is true, spinning first, then with growing sleeps. Returns False if the deadline passed.

    deadline: by time.monotonic().
    """
    started, sleep_s = time.monotonic(), _SHORTEST_SLEEP_S
    while not done():
        now = time.monotonic()
        if now > deadline:
            return False
        if now > started + _SPIN_S:
            time.sleep(sleep_s)
            sleep_s = min(2 * sleep_s, _LONGEST_SLEEP_S)
    return True

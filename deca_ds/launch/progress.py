"""What this rank's main thread does and waits for; watchdog/heartbeats.py tells it to the others."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from deca_ds.launch.launcher import ClientLayout

# Raw deadline of the libraries' waits while the watcher measures progress: longer than any run. Theirs count from the
# start of a wait, however much the awaited rank is doing meanwhile.
_BACKSTOP_S = 30 * 24 * 3600.0

EVERYBODY = "all"
SHARED = "shared"


class Progress:
    """What this rank's main thread does. Written by that thread, read by the watcher.

    awaits: what a wait is for: a client's number (those of its ranks that this one exchanges with), EVERYBODY, or None:
    this client's other ranks, as far as it waits for anybody. SHARED: for these and for any rank that notes the same,
    because libraries lock what the ranks of a host share, like the cache of downloads.
    works: the phase is work of this rank's own, in which signs of it (signs.py) count as moving on.
    """

    def __init__(self) -> None:
        self.phase, self.step, self.block = "starting", 0, ""
        self.awaits: int | str | None = None
        self.works = False
        self.moved = time.monotonic()
        self.layout: ClientLayout | None = None
        self.timeout_s: float | None = None  # None: nobody watches this rank

    def enter(
        self,
        phase: str,
        *,
        step: int | None = None,
        block: str | None = None,
        works: bool = False,
        awaits: int | str | None = None,
    ) -> None:
        """Note that `phase` begins. step: inner step, counted from 1. block: the active one; both stay if left out."""
        self.phase = phase
        if step is not None:
            self.step = step
        if block is not None:
            self.block = block
        self.works, self.awaits = works, awaits
        self.moved = time.monotonic()

    def tick(self) -> None:
        """Note that the phase continues."""
        self.moved = max(self.moved, time.monotonic())  # it may be granted more

    @contextmanager
    def granted(self, seconds: float) -> Iterator[None]:
        """Note that the body may wait for so long for what is no rank and gives no sign: standing still begins then."""
        self.moved = time.monotonic() + seconds
        try:
            yield
        finally:
            self.moved = time.monotonic()

    @property
    def at_work(self) -> bool:
        """Whether signs of work count: not in a wait that has been noted."""
        return self.works and self.awaits in (None, SHARED)

    def wait_for(self, awaits: int | str | None) -> None:
        """Note whom this rank waits for from now on; None: for nobody but its own client's ranks."""
        self.awaits = awaits

    @contextmanager
    def waiting(self, awaits: int | str | None) -> Iterator[None]:
        """Note that all that is done in the body waits for `awaits`."""
        before, self.awaits = self.awaits, awaits
        try:
            yield
        finally:
            self.awaits = before

    def watch(self, layout: ClientLayout, timeout_s: float) -> None:
        """Have the watcher end the job from now on if neither this rank nor one that it waits for moves on."""
        self.layout, self.timeout_s = layout, timeout_s
        self.tick()

    def deadline_s(self, timeout_s: float) -> float:
        """Return what to give a library as the longest wait: `timeout_s`, or far more if a watcher sees to it."""
        return timeout_s if self.timeout_s is None else _BACKSTOP_S

    @property
    def place(self) -> str:
        """For messages: phase, step and block."""
        return place(self.phase, self.step, self.block)


def place(phase: str, step: int, block: str) -> str:
    """Name a place in a message: phase, step and block, as far as there are any."""
    return phase + (f", step {step}" if step else "") + (f", block {block}" if step and block else "")

"""How a rank ends when all ranks have agreed to stop before any of them trains. An exception interrupts its main
thread, wherever that is, so that everything that is open gets closed, MPI included. If the main thread cannot react,
for example inside a collective that other ranks never join, the watcher's thread ends the process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import NoReturn

from torch.distributed import Store

from deca_ds.watchdog.patience import Patience


class StopBeforeTraining(BaseException):
    """All ranks have agreed to stop before training; this is no error."""


class EarlyEnd:
    """Ends this rank before it trains. leaving: the lock of the thread that ends this process. meet: waits until all
    ranks know. leave: ends this process when no other rank needs it any more. reacts_s: see Patience."""

    def __init__(
        self,
        leaving: threading.Lock,
        meet: Callable[[Store], None],
        leave: Callable[[Store], NoReturn],
        reacts_s: float = Patience.reacts_s,
    ):
        self._leaving, self._meet, self._leave, self._reacts_s = leaving, meet, leave, reacts_s
        self._comes = threading.Event()
        self._tell: Callable[[], None] = lambda: None
        self._too_late = False

    def expect(self, tell: Callable[[], None]) -> None:
        """Have the thread that ends this process call `tell`."""
        self._tell = tell

    def forbid(self) -> None:
        """Never interrupt the main thread from now on: it is already ending."""
        self._too_late = True

    def interrupt(self, end: BaseException | None = None) -> None:
        """Raise `end` or, without one, StopBeforeTraining, once only; for a signal handler of the main thread."""
        if not self._too_late:
            self._too_late = True
            raise end or StopBeforeTraining

    def watch(self, store: Store) -> None:
        """Have SIGUSR1 interrupt the main thread, by a handler that calls `interrupt`. The watcher's thread, to which
        `store` belongs, calls this."""
        if self._too_late:
            return
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
        if not self._comes.wait(self._reacts_s) and self._leaving.acquire(blocking=False):
            self._end(store)
            self._leave(store)

    def end(self, store: Store) -> None:
        """End this rank, in the main thread, after the interrupt."""
        self._comes.set()
        self._leaving.acquire()
        self._end(store)

    def _end(self, store: Store) -> None:
        """Wait until all ranks know why, before any connection closes."""
        self._tell()
        self._meet(store)

"""How a rank ends where all have agreed to stop before any of them trains: wherever its main thread is, by an exception
there, so that what it has begun is closed, MPI too. If it does not come to that, as in a collective with ranks that do
not come either, the watcher's thread ends the process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import NoReturn

from torch.distributed import Store

_COMES_S = 5.0  # for the main thread


class StopBeforeTraining(BaseException):
    """All ranks have agreed to: no error."""


class EarlyEnd:
    """leaving: held by the thread that ends this process. meet: waits until all ranks know. leave: ends this process
    when those that need it are through."""

    def __init__(self, leaving: threading.Lock, meet: Callable[[Store], None], leave: Callable[[Store], NoReturn]):
        self._leaving, self._meet, self._leave = leaving, meet, leave
        self._comes = threading.Event()
        self._tell: Callable[[], None] = lambda: None
        self._too_late = False

    def expect(self, tell: Callable[[], None]) -> None:
        """tell: called by the thread that ends this process."""
        self._tell = tell

    def forbid(self) -> None:
        """The main thread ends already, and must not be interrupted any more."""
        self._too_late = True

    def interrupt(self, end: BaseException | None = None) -> None:
        """In a signal handler of the main thread: raise `end`, or else StopBeforeTraining, there, once."""
        if not self._too_late:
            self._too_late = True
            raise end or StopBeforeTraining

    def watch(self, store: Store) -> None:
        """In the watcher's thread, which has this connection: have SIGUSR1 interrupt the main thread, by a handler that
        calls `interrupt`."""
        if self._too_late:
            return
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
        if not self._comes.wait(_COMES_S) and self._leaving.acquire(blocking=False):
            self._end(store)
            self._leave(store)

    def end(self, store: Store) -> None:
        """In the main thread, which has been interrupted."""
        self._comes.set()
        self._leaving.acquire()
        self._end(store)

    def _end(self, store: Store) -> None:
        """Nobody's connections close before all know why."""
        self._tell()
        self._meet(store)

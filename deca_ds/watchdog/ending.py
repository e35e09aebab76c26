"""How a rank's process ends, and what it tells then: to the others, on its own output, and in the run's folder.

What may quote a client's data is told on that client's own output and in its own FAILED file; the others learn which
rank it was and what kind of failure.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from deca_ds.errors import (
    FAILURE_CODE,
    ConnectionLostError,
    CutOffError,
    MessageError,
    RankLostError,
    exit_code,
    public_message,
    whole_message,
)
from deca_ds.launch import Launch
from deca_ds.launch.store_site import StoreSite
from deca_ds.watchdog.failure import Failure, is_lost_connection, lost_connection, tell_exit_code
from deca_ds.watchdog.heartbeats import Heartbeats
from deca_ds.watchdog.restart import come_back

_LINGER_S = 2.0  # the store's host stays until the others have read why the job ends


class Ending:
    """Ends this rank's process.

    output: the run's folder, as soon as it is ours to write to. begun: taken, and never given back, by whoever ends
    this process: its own watcher sees a failure as soon as it is reported, and must not end the process before the
    message is told. at_exit: called when this rank is through, so that nobody takes its end for a death.
    """

    def __init__(self, launch: Launch, site: StoreSite, heartbeats: Heartbeats):
        self.output: Path | None = None
        self.begun = threading.Lock()
        self.at_exit: list[Callable[[], None]] = []
        self._launch, self._site, self._heartbeats = launch, site, heartbeats

    def write_to(self, output: Path) -> None:
        """The run's folder is known, and ours to write to."""
        self.output = output

    def report(self, message: str, code: int) -> Failure:
        """Of this rank, at what it does."""
        place = self._heartbeats.progress.place
        return Failure(self._launch.rank, self._launch.host, "" if place == "starting" else place, message, code)

    def end_the_job(self, error: BaseException) -> None:
        """Tell all ranks, unless another one was first, which end with this one."""
        code, (public, whole) = exit_code(error), self._told(error)
        report = first = self.report(public, code)
        with contextlib.suppress(RuntimeError):  # the store is gone if rank 0 died: report what we know
            first = report.report(self._site.store.store)
        self.leave(self.report(whole, code) if first == report else first)

    def end_the_client(self, error: BaseException) -> None:
        """End this rank, and with it its client, while the others go on."""
        client = self._heartbeats.own().client
        report = self.report(self._told(error)[1], FAILURE_CODE)
        report.tell(of_client=client)
        report.mark(self.output, f"FAILED_client_{client:03d}")
        sys.stdout.flush()
        # not an exit: mpirun lets the others go on after a process that died, and ends them after one that failed
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(_LINGER_S)

    def leave(self, report: Failure, *, mark: bool = True) -> None:
        """End for the reason that is reported. mark: whether the job is not done."""
        if report.rank == self._launch.rank:
            report.tell(alone=self._launch.world_size == 1)
        if mark:
            report.mark(self.output, "FAILED")
        tell_exit_code(report.code)
        if self._launch.rank == self._site.host and self._launch.world_size > 1:
            time.sleep(_LINGER_S)
        end_process(report.code)

    def come_back(self, why: str, return_s: float, *, through: bool = True) -> NoReturn:
        """Become a new process that tries for so long to join the others again. through: whether they hear that this
        rank is through."""
        client = self._heartbeats.own().client
        who = "this client" if client is None else f"client {client}"
        print(f"\nWARNING: {who} {why}; it tries to come back for {return_s:.0f} s", file=sys.stderr)
        for callback in self.at_exit if through else ():
            callback()
        come_back(return_s)

    def _told(self, error: BaseException) -> tuple[str, str]:
        """What people read of `error`, on other clients' outputs and on the own one. Of a connection that broke off, a
        traceback would be of whom it hit, not of whom it is about."""
        if is_lost_connection(error):
            rank = error.rank if isinstance(error, ConnectionLostError) else None
            if others := self._heartbeats.other_end(self._site.store.store, rank):
                lost = lost_connection(error, others)
                return lost, lost
        seen = self._last_seen(error)
        return public_message(error) + seen, whole_message(error) + seen

    def _last_seen(self, error: BaseException) -> str:
        """Where the awaited ranks are, if `error` is of a connection or a library's wait."""
        of_others = (MessageError, RankLostError, RuntimeError)
        if isinstance(error, of_others) and not isinstance(error, CutOffError) and self._launch.world_size > 1:
            with contextlib.suppress(RuntimeError):  # the store is gone
                return self._heartbeats.last_seen(self._site.store.store)
        return ""


def end_process(code: int) -> NoReturn:
    """At once: exit handlers of MPI and of process groups would wait for the ranks that failed."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

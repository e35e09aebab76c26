"""How a rank's process ends, and what it reports then: to the others, on its own output, and in the run's folder.

A message that may quote a client's data appears only on that client's own output and in its own FAILED file; the others
learn which rank failed, and the kind of failure.
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
    UserError,
    exit_code,
    public_message,
    whole_message,
)
from deca_ds.launch import Launch
from deca_ds.launch.given import look_for_files
from deca_ds.launch.store_site import StoreSite
from deca_ds.printing import print_wrapped
from deca_ds.run_folder import CLIENT_FAILED, FAILED
from deca_ds.watchdog.failure import (
    Failure,
    all_leave,
    is_lost_connection,
    lost_connection,
    note_leaving,
    tell_exit_code,
)
from deca_ds.watchdog.heartbeats import Heartbeats
from deca_ds.watchdog.restart import come_back

_LINGER_S = 10.0  # so long at most the store's host stays until the others have read why the job ends
_LOOK_S = 0.05


class Ending:
    """Ends this rank's process.

    output: the run's folder, as soon as it is ours to write to. begun: the thread that ends this process acquires it,
    and never releases it: this rank's own watcher sees a failure as soon as it is reported, and must not end the
    process before the message is printed. at_exit: called when this rank is done, so that nobody takes its end for a
    death.
    """

    def __init__(self, launch: Launch, site: StoreSite, heartbeats: Heartbeats):
        self.output: Path | None = None
        self.begun = threading.Lock()
        self.at_exit: list[Callable[[], None]] = []
        self._launch, self._site, self._heartbeats = launch, site, heartbeats

    def write_to(self, output: Path) -> None:
        """Write to `output`, the run's folder, from now on."""
        self.output = output

    def report(self, message: str, code: int) -> Failure:
        """Make a report of this rank's failure in its current phase."""
        place = self._heartbeats.progress.place
        return Failure(self._launch.rank, self._launch.host, "" if place == "starting" else place, message, code)

    def end_in_order(self, told: str) -> NoReturn:
        """End because the job, in which this rank takes no part yet, has ended in order. told: what to print, if
        anything."""
        if told:
            print_wrapped(told, sys.stdout)
        end_process(0)

    def end_alone(self, error: BaseException, *, mark: bool) -> NoReturn:
        """Report the failure to no other rank, and end. mark: see `leave`."""
        self.leave(self.report(whole_message(error), exit_code(error)), mark=mark)

    def end_the_job(self, error: BaseException) -> NoReturn:
        """Report the failure to all ranks, unless another rank was first, and end; they end with this one."""
        code, (public, whole) = exit_code(error), self._told(error)
        report = first = self.report(public, code)
        with contextlib.suppress(RuntimeError):  # the store is gone if rank 0 died: report what we know
            first = report.report(self._site.store.store)
            note_leaving(self._launch.rank, self._site.store.store)
        if first == report:
            first = self.report(whole, code)
            first.mark(self.output, FAILED, replaces=True)  # the others know less, and may have marked it already
        self.leave(first)

    def end_the_client(self, error: BaseException) -> NoReturn:
        """End this rank, and with it its client, while the others continue."""
        client = self._heartbeats.own().client
        assert client is not None, "clients are known once the others may continue without one"
        report = self.report(self._told(error)[1], FAILURE_CODE)
        report.tell(of_client=client)
        report.mark(self.output, CLIENT_FAILED.format(client))
        sys.stdout.flush()
        # not an exit: mpirun lets the others continue after a process that died, and ends them after one that failed
        os.kill(os.getpid(), signal.SIGKILL)
        while True:  # until the signal arrives
            signal.pause()

    def leave(self, report: Failure, *, mark: bool = True) -> NoReturn:
        """End for the reason in `report`. mark: whether to mark the run as failed."""
        if report.rank == self._launch.rank:
            report.tell(alone=self._launch.world_size == 1)
        if mark:
            report.mark(self.output, FAILED)
        tell_exit_code(report.code)
        if self._launch.rank == self._site.host and self._launch.world_size > 1:
            with contextlib.suppress(RuntimeError):
                self._linger()
        end_process(report.code)

    def _linger(self) -> None:
        """Stay until the others leave, too: without the store they would not learn why the job ends."""
        others, deadline = set(self._heartbeats.ranks()) - {self._launch.rank}, time.monotonic() + _LINGER_S
        store = self._site.store.reconnect()  # another thread may wait in the present connection
        while not all_leave(others, store) and time.monotonic() < deadline:
            time.sleep(_LOOK_S)

    def come_back(self, why: str, return_s: float, *, through: bool = True) -> NoReturn:
        """Become a new process that tries for `return_s` seconds to rejoin the others. through: whether they learn that
        this rank is done."""
        client = self._heartbeats.own().client
        who = "this client" if client is None else f"client {client}"
        print_wrapped(f"\nWARNING: {who} {why}; it tries to rejoin for {return_s:.0f} s")
        for callback in self.at_exit if through else ():
            callback()
        come_back(return_s)

    def _told(self, error: BaseException) -> tuple[str, str]:
        """Return the message about `error` for other clients' outputs, and the one for this client's own. After a lost
        connection, a traceback would show the rank that noticed the loss, not the rank that caused it."""
        if is_lost_connection(error):
            rank = error.rank if isinstance(error, ConnectionLostError) else None
            if others := self._heartbeats.other_end(self._site.store.store, rank):
                lost = lost_connection(error, others)
                return lost, lost
        more = self._last_seen(error)
        if isinstance(error, UserError) and error.of_host and self._launch.spans_hosts:
            more += f". {look_for_files()}"
        return public_message(error) + more, whole_message(error) + more

    def _last_seen(self, error: BaseException) -> str:
        """Say where the awaited ranks are, if `error` comes from a connection or from a wait inside a library."""
        of_others = (MessageError, RankLostError, RuntimeError)
        if isinstance(error, of_others) and not isinstance(error, CutOffError) and self._launch.world_size > 1:
            with contextlib.suppress(RuntimeError):  # the store is gone
                return self._heartbeats.last_seen(self._site.store.store)
        return ""


def end_process(code: int) -> NoReturn:
    """End this process at once: exit handlers of MPI and of process groups would wait for the ranks that failed."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

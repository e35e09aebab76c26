"""Every rank's failure ends the whole job within seconds and names itself.

The first rank that fails writes its message to the job's store. A thread in every other rank sees it there and ends its
process, whatever the process waits for (a collective, a message, a slow disk). The job leaves a FAILED marker with the
message of that first rank, or a DONE marker. What may quote a client's data is told on that client's own output and in
its own FAILED file; the others learn which rank it was and what kind of failure. The same thread sends this rank's
heartbeats and ends waits that last too long (heartbeats.py). It ends this process as well when the store no longer
answers (store_watch.py).

With cluster.on_failure=continue, from the first step on: a rank that fails tells it on its own output and in
FAILED_client_NNN and kills itself, as the MPI library expects of the dead. The store may go with its host, until the
survivors have put up another one. A rank that hangs, or waits too long for others of its client, ends that client; over
torch the others put it out, too, if its process does not run.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from torch.distributed import Store

from deca_ds.errors import (
    CutOffError,
    MessageError,
    RankLostError,
    StallError,
    UserError,
    public_message,
    whole_message,
)
from deca_ds.launch.launcher import Launch
from deca_ds.launch.progress import SHARED, Progress
from deca_ds.launch.store import JobStore
from deca_ds.watchdog.failure import FAILURE_CODE, USER_ERROR_CODE, Failure
from deca_ds.watchdog.heartbeats import FOLDER as HEARTBEATS
from deca_ds.watchdog.heartbeats import Heartbeats
from deca_ds.watchdog.restart import come_back
from deca_ds.watchdog.stop import StopByCommit, StopByStore
from deca_ds.watchdog.store_watch import StoreWatch
from deca_ds.watchdog.survey import Survey

_DONE_KEY = "job/done"
_POLL_S, _STOPPING_POLL_S = 0.5, 0.05
_CUT_OFF_S = 5.0  # for a rank that has lost another one of its client to notice that the client is cut off
_NO_ANSWER_S = 1.0  # for a failure that is being reported to a store that does not answer
_OTHERS_S = 60.0  # for the survivors to put out who hangs and to put up another store, until all ends
_LINGER_S = 2.0  # the store's host stays until the others have read why the job ends


class JobGuard:
    """Watches the job for this rank. `store` is the job's, wherever it is now, and `host` the rank that hosts it;
    `output` is the run's folder, once it is known to be ours to write to; `stop` is how the job is told to stop, and
    where. farewells: what this rank does when it is through, so that nobody takes its end for a death. return_s:
    cluster.return_s, where it holds. cut_off: set when the others are out of reach. put_out_who_hangs: called every
    second while nobody in the job moves on, where the others can do that."""

    def __init__(self, launch: Launch, store: JobStore):
        self.launch = launch
        self.output: Path | None = None
        self.heartbeats = Heartbeats(launch, store.progress, gone=launch.absent)
        self._survey = Survey(self.heartbeats)
        self.stop: StopByStore | StopByCommit = StopByStore(
            launch.rank, launch.world_size, store.timeout.total_seconds()
        )
        self.store = store
        self.farewells: list[Callable[[], None]] = []
        self.return_s, self.cut_off = 0.0, threading.Event()
        self.put_out_who_hangs: Callable[[], None] | None = None
        self.host, self._ranks = launch.first, len(launch.ranks)  # ranks that use the store
        self._outlived = False  # whether the others go on when this rank fails
        self._visits = False
        self._abrupt = False  # whether somebody has died
        self._parent = os.getppid()
        self._finished = threading.Event()
        # Taken, and never given back, by whoever ends this process: its own watcher sees a failure as soon as it is
        # reported, and must not end the process before the message is told.
        self._leaving = threading.Lock()
        self._start_watching()

    @property
    def progress(self) -> Progress:
        """Where this rank's main thread notes what it does."""
        return self.heartbeats.progress

    def write_to(self, output: Path) -> None:
        """The run's folder is known, and ours to write to."""
        self.output = output
        self.heartbeats.folder = output / HEARTBEATS

    def let_others_go_on(self) -> None:
        """From now on a failure of this rank ends its own client alone."""
        self._outlived, self._visits, self._silence.more_s = True, False, _OTHERS_S

    def visit(self, host: int) -> None:
        """This rank is not of the job yet: until `let_others_go_on` its failure is its own. host: see JobGuard."""
        self.host, self._visits, self._silence.more_s = host, True, _OTHERS_S

    def survive(self, ranks: Sequence[int], store: JobStore | None) -> None:
        """Others have died and these are in now. store: another one, which the first of `ranks` hosts, if the host of
        the old one has died."""
        self.heartbeats.gone = frozenset(range(self.launch.world_size)) - frozenset(ranks)
        self._ranks, self._abrupt = len(ranks), True
        if store is not None:
            self.host, self.store = ranks[0], store
            self._silence.close()
            self._start_watching(_OTHERS_S)

    def fail(self, error: BaseException) -> None:
        """Report `error`, unless another rank was first, and end this process. Does not return."""
        self._leaving.acquire()
        if self.return_s and (self._outlived or self._visits) and self._is_cut_off(error):
            self.come_back(f"was cut off: {error}")
        if self.return_s and self._outlived and isinstance(error, StallError):
            self.come_back(f"hangs: {error}", through=False)
        if self._outlived:
            self._die(whole_message(error) + self._last_seen(error))
        code = USER_ERROR_CODE if isinstance(error, UserError) else FAILURE_CODE
        if self._visits:
            self._leave(self._report(whole_message(error), code))
        seen = self._last_seen(error)
        report = first = self._report(public_message(error) + seen, code)
        with contextlib.suppress(RuntimeError):  # the store is gone if rank 0 died: report what we know
            first = report.report(self.store.store)
        self._leave(self._report(whole_message(error) + seen, code) if first == report else first)

    def come_back(self, why: str, *, through: bool = True) -> NoReturn:
        """Become a new process that tries to join the others again. through: see `farewells`."""
        client = self.heartbeats.own().client
        who = "this client" if client is None else f"client {client}"
        print(f"\nWARNING: {who} {why}; it tries to come back for {self.return_s:.0f} s", file=sys.stderr)
        for farewell in self.farewells if through else ():
            farewell()
        come_back(self.return_s)

    def _is_cut_off(self, error: BaseException) -> bool:
        if isinstance(error, CutOffError):
            return True
        # another rank of this client may know already: then what broke here is the connection to that one
        of_a_connection = isinstance(error, (MessageError, RankLostError, RuntimeError))
        return self._outlived and of_a_connection and self.cut_off.wait(_CUT_OFF_S)

    def finish(self) -> None:
        """Stop watching: every rank is through. The store's host leaves last. After a death, ends this process."""
        self.progress.enter("done")
        for farewell in self.farewells:
            farewell()
        store = self.store.store
        # one that dies now, all being through, is nobody's concern
        with contextlib.suppress(RuntimeError) if self._outlived else contextlib.nullcontext():
            store.add(_DONE_KEY, 1)
            if self.launch.rank == self.host:
                deadline = time.monotonic() + self.store.timeout.total_seconds()
                while store.add(_DONE_KEY, 0) < self._ranks and time.monotonic() < deadline:
                    time.sleep(0.05)
        self._finished.set()
        self._thread.join(timeout=2 * _POLL_S)
        self.heartbeats.beat(store, last=True)
        if self._abrupt:
            self._end(0)  # MPI_Finalize, an exit handler, may wait for the dead for ever
        gc.freeze()  # or the interpreter would look for garbage in everything, several times: a second of each rank

    def _start_watching(self, more_s: float = 0.0) -> None:
        self._silence = StoreWatch(self.progress, self.store.timeout.total_seconds(), self._no_answer, more_s)
        watch = self._watch if self.launch.world_size > 1 else self._beat
        arguments = self.store, self.store.reconnect(), self._silence
        self._thread = threading.Thread(target=watch, args=arguments, daemon=True)
        self._thread.start()

    def _beat(self, job: JobStore, store: Store, silence: StoreWatch) -> None:
        """All that there is to do for a single rank."""
        silence.close()
        while not self._finished.wait(_POLL_S):
            self.heartbeats.beat(store)

    def _watch(self, job: JobStore, store: Store, silence: StoreWatch) -> None:
        while self.store is job and not self._finished.wait(_STOPPING_POLL_S if self.stop.pending else _POLL_S):
            self._leave_if_out()
            try:
                self.stop.look(store)
                report = self._look(store)
                silence.answered()
            except RuntimeError:
                if self._finished.is_set():
                    break
                if self._outlived:
                    continue  # the survivors will put up another one
                self._visit_again()
                gone = f"rank {self.host} is gone: it ended without a report"
                gone += ", before this client was let in: join again" if self._visits else ""
                report = self._report(gone, FAILURE_CODE)
            except Exception as error:  # without its watcher a rank could wait for ever
                report = self._report(f"the watcher has failed: {error!r}", FAILURE_CODE)
            if report is not None:
                self._leaving.acquire()
                self._leave(report)
        silence.close()

    def _leave_if_out(self) -> None:
        """The others have put this client out, and the main thread, which may hang, does not come to learn of it."""
        hangs = time.monotonic() - self.progress.moved > (self.progress.timeout_s or 0.0)
        if hangs and self._outlived and self.cut_off.is_set() and not self._finished.wait(_CUT_OFF_S):
            self.fail(CutOffError("this client is out of the job, and its main thread hangs"))

    def _no_answer(self, idle_s: float, silent_s: float) -> None:
        silence = StallError(
            f"no progress for {idle_s:.0f} s, and no answer for {silent_s:.0f} s from the job's store, which rank "
            f"{self.host} hosts",
            where=self.progress.place,
            fix=f"look at rank {self.host}: it is stopped as a process, or its host is out of reach",
        )
        self._visit_again()
        # the main thread may have taken it, to tell the store what that will never hear
        self._leaving.acquire(timeout=_NO_ANSWER_S)
        self._leave(self._report(str(silence), USER_ERROR_CODE))

    def _visit_again(self) -> None:
        if self._visits and self.return_s:
            self._leaving.acquire()
            self.come_back("has lost the job before it was let in")

    def _look(self, store: Store) -> Failure | None:
        """A reason to end this process, if there is one."""
        # The launcher was killed: nobody would ever collect this process. One that was told to stop, as we were, may go
        # before we are through.
        if os.getppid() != self._parent and not self.stop.pending:
            return self._report("the launcher is gone, so this rank stops", FAILURE_CODE)
        if (reported := Failure.reported(store)) is not None:
            return reported
        if not self.heartbeats.beat(store):
            return None
        if self.launch.rank == self.host:
            self._survey.publish(store)
        stall = self.heartbeats.stalled(store, own=self._outlived)
        if stall is None or self._others_see_to(stall):
            return None
        report = self._report(str(stall), USER_ERROR_CODE)
        return report if self._visits else report.report(store)

    def _others_see_to(self, stall: StallError) -> bool:
        """Whether the job can go on without whoever hangs. Does not return if that is of this rank's client."""
        if not (self._outlived or self._visits) or stall.idle_s > (self.progress.timeout_s or 0.0) + _OTHERS_S:
            return False
        if self._outlived and stall.clients == {self.heartbeats.own().client}:
            self.fail(stall)
        if self.progress.awaits not in (None, SHARED) and self.put_out_who_hangs is not None:
            self.put_out_who_hangs()
        return True

    def _last_seen(self, error: BaseException) -> str:
        """Where the awaited ranks are, if `error` is of a connection or a library's wait."""
        if isinstance(error, (MessageError, RuntimeError)) and self.launch.world_size > 1:
            with contextlib.suppress(RuntimeError):  # the store is gone
                return self.heartbeats.last_seen(self.store.store)
        return ""

    def _report(self, message: str, code: int) -> Failure:
        place = self.progress.place
        return Failure(self.launch.rank, self.launch.host, "" if place == "starting" else place, message, code)

    def _leave(self, report: Failure) -> None:
        if report.rank == self.launch.rank:
            report.tell(alone=self.launch.world_size == 1)
        if not self._visits:
            report.mark(self.output, "FAILED")
        if self.launch.rank == self.host and self.launch.world_size > 1:
            time.sleep(_LINGER_S)
        self._end(report.code)

    def _die(self, message: str) -> None:
        """End this rank, and with it its client, while the others go on. Does not return."""
        client = self.heartbeats.own().client
        report = self._report(message, FAILURE_CODE)
        report.tell(of_client=client)
        report.mark(self.output, f"FAILED_client_{client:03d}")
        sys.stdout.flush()
        # not an exit: mpirun lets the others go on after a process that died, and ends them after one that failed
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(_LINGER_S)

    @staticmethod
    def _end(code: int) -> None:
        # not sys.exit: exit handlers of MPI and of process groups wait for the ranks that failed
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@contextlib.contextmanager
def guarded(launch: Launch, store: JobStore) -> Iterator[JobGuard]:
    """Run the body under a `JobGuard`: any exception in it ends the job, its end is waited for on all ranks."""
    guard = JobGuard(launch, store)
    try:
        yield guard
    except BaseException as error:
        guard.fail(error)
    guard.finish()

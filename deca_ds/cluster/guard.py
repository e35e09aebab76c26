"""Every rank's failure ends the whole job within seconds and names itself.

The first rank that fails writes its message to the job's store. A thread in every other rank sees it there and ends its
process, whatever the process waits for (a collective, a message, a slow disk). The job leaves a FAILED marker with the
message of that first rank, or a DONE marker. What may quote a client's data is told on that client's own output and in
its own FAILED file; the others learn which rank it was and what kind of failure. The same thread sends this rank's
heartbeats and ends waits that last too long (heartbeat.py). It ends this process as well when the store no longer
answers (silence.py).

With cluster.on_failure=continue, from the first step on: a rank that fails tells it on its own output and in
FAILED_client_NNN and kills itself, as the MPI library expects of the dead; and the store may go with its host, until
the survivors have put up another one.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from torch.distributed import Store

from deca_ds.cluster.comeback import come_back
from deca_ds.cluster.heartbeat import FOLDER as HEARTBEATS
from deca_ds.cluster.heartbeat import Heartbeats, Progress
from deca_ds.cluster.launch import Launch
from deca_ds.cluster.silence import Silence
from deca_ds.cluster.stop import StopAgreement, StopQuestion
from deca_ds.cluster.store import JobStore
from deca_ds.errors import (
    CutOffError,
    MessageError,
    RankLostError,
    StallError,
    UserError,
    public_message,
    whole_message,
)

_FAILED_KEY, _DONE_KEY = "job/failed", "job/done"
_POLL_S, _STOPPING_POLL_S = 0.5, 0.05
_CUT_OFF_S = 5.0  # for a rank that has lost another one of its client to notice that the client is cut off
_NO_ANSWER_S = 1.0  # for a failure that is being reported to a store that does not answer
_LINGER_S = 2.0  # the store's host stays until the others have read why the job ends

USER_ERROR_CODE, FAILURE_CODE = 2, 1


class JobGuard:
    """Watches the job for this rank. `output` is the run's folder, once it is known to be ours to write to; `stop` is
    how the job is told to stop, and where. host: the rank that hosts the job's store. farewells: what this rank does
    when it is through, so that nobody takes its end for a death. return_s: cluster.return_s, where it holds. cut_off:
    set when the others are out of reach."""

    def __init__(self, launch: Launch, store: JobStore):
        self.launch = launch
        self.output: Path | None = None
        self.heartbeats = Heartbeats(launch, gone=launch.absent)
        self.stop: StopAgreement | StopQuestion = StopAgreement(
            launch.rank, launch.world_size, store.timeout.total_seconds()
        )
        self._store = store
        self.farewells: list[Callable[[], None]] = []
        self.return_s, self.cut_off = 0.0, threading.Event()
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
        self._outlived, self._visits = True, False

    def visit(self, host: int) -> None:
        """This rank is not of the job yet: until `let_others_go_on` its failure is its own. host: see JobGuard."""
        self.host, self._visits = host, True

    def survive(self, ranks: Sequence[int], store: JobStore | None) -> None:
        """Others have died and these are in now. store: another one, which the first of `ranks` hosts, if the host of
        the old one has died."""
        self.heartbeats.gone = frozenset(range(self.launch.world_size)) - frozenset(ranks)
        self._ranks, self._abrupt = len(ranks), True
        if store is not None:
            self.host, self._store = ranks[0], store
            self._start_watching()

    @property
    def store(self) -> JobStore:
        """The job's store, wherever it is now."""
        return self._store

    def fail(self, error: BaseException) -> None:
        """Report `error`, unless another rank was first, and end this process. Does not return."""
        self._leaving.acquire()
        if self.return_s and (self._outlived or self._visits) and self._is_cut_off(error):
            self.come_back(f"was cut off: {error}")
        if self._outlived:
            self._die(whole_message(error) + self._last_seen(error))
        code = USER_ERROR_CODE if isinstance(error, UserError) else FAILURE_CODE
        if self._visits:
            self._leave(self._report(whole_message(error), code), announce=True)
        seen = self._last_seen(error)
        report = json.dumps(self._report(public_message(error) + seen, code))
        first = report
        with contextlib.suppress(RuntimeError):  # the store is gone if rank 0 died: report what we know
            first = self._store.store.compare_set(_FAILED_KEY, "", report).decode() or report
        if first == report:
            self._leave(self._report(whole_message(error) + seen, code), announce=True)
        self._leave(json.loads(first))

    def come_back(self, why: str) -> NoReturn:
        """Become a new process that tries to join the others again."""
        client = self.heartbeats.own().client
        who = "this client" if client is None else f"client {client}"
        print(f"\nWARNING: {who} {why}; it tries to come back for {self.return_s:.0f} s", file=sys.stderr)
        for farewell in self.farewells:
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
        store = self._store.store
        # one that dies now, all being through, is nobody's concern
        with contextlib.suppress(RuntimeError) if self._outlived else contextlib.nullcontext():
            store.add(_DONE_KEY, 1)
            if self.launch.rank == self.host:
                deadline = time.monotonic() + self._store.timeout.total_seconds()
                while store.add(_DONE_KEY, 0) < self._ranks and time.monotonic() < deadline:
                    time.sleep(0.05)
        self._finished.set()
        self._thread.join(timeout=2 * _POLL_S)
        self.heartbeats.beat(store, last=True)
        if self._abrupt:
            self._end(0)  # MPI_Finalize, an exit handler, may wait for the dead for ever
        gc.freeze()  # or the interpreter would look for garbage in everything, several times: a second of each rank

    def _start_watching(self) -> None:
        watch = self._watch if self.launch.world_size > 1 else self._beat
        self._thread = threading.Thread(target=watch, args=(self._store, self._store.reconnect()), daemon=True)
        self._thread.start()

    def _beat(self, job: JobStore, store: Store) -> None:
        """All that there is to do for a single rank."""
        while not self._finished.wait(_POLL_S):
            self.heartbeats.beat(store)

    def _watch(self, job: JobStore, store: Store) -> None:
        silence = Silence(self.progress, job.timeout.total_seconds(), self._no_answer)
        with contextlib.closing(silence):
            self._ask(job, store, silence)

    def _ask(self, job: JobStore, store: Store, silence: Silence) -> None:
        while self._store is job and not self._finished.wait(_STOPPING_POLL_S if self.stop.pending else _POLL_S):
            try:
                self.stop.look(store)
                report, announce = self._look(store)
                silence.answered()
            except RuntimeError:
                if self._finished.is_set():
                    return
                if self._outlived:
                    continue  # the survivors will put up another one
                if self.return_s:
                    self._leaving.acquire()
                    self.come_back("has lost the job before it was let in")
                gone = f"rank {self.host} is gone: it ended without a report"
                gone += ", before this client was let in: join again" if self._visits else ""
                report, announce = self._report(gone, FAILURE_CODE), True
            except Exception as error:  # without its watcher a rank could wait for ever
                report, announce = self._report(f"the watcher has failed: {error!r}", FAILURE_CODE), True
            if report is not None:
                self._leaving.acquire()
                self._leave(report, announce)

    def _no_answer(self, idle_s: float, silent_s: float) -> None:
        silence = StallError(
            f"no progress for {idle_s:.0f} s, and no answer for {silent_s:.0f} s from the job's store, which rank "
            f"{self.host} hosts",
            where=self.progress.place,
            fix=f"look at rank {self.host}: it is stopped as a process, or its host is out of reach",
        )
        # the main thread may have taken it, to tell the store what that will never hear
        self._leaving.acquire(timeout=_NO_ANSWER_S)
        self._leave(self._report(str(silence), USER_ERROR_CODE), announce=True)

    def _look(self, store: Store) -> tuple[dict | None, bool]:
        """A reason to end this process, if there is one, and whether it has yet to be told."""
        # The launcher was killed: nobody would ever collect this process. One that was told to stop, as we were, may go
        # before we are through.
        if os.getppid() != self._parent and not self.stop.pending:
            return self._report("the launcher is gone, so this rank stops", FAILURE_CODE), True
        if store.check([_FAILED_KEY]):
            return json.loads(store.get(_FAILED_KEY).decode()), False
        stall = self.heartbeats.stalled(store) if self.heartbeats.beat(store) else None
        if stall is not None:
            report = self._report(str(stall), USER_ERROR_CODE)
            first = json.loads(store.compare_set(_FAILED_KEY, "", json.dumps(report)).decode())
            return first, first == report
        return None, False

    def _last_seen(self, error: BaseException) -> str:
        """Where the awaited ranks are, if `error` is of a connection or a library's wait."""
        if not isinstance(error, (MessageError, RuntimeError)) or self.launch.world_size == 1:
            return ""
        with contextlib.suppress(RuntimeError):  # the store is gone
            return self.heartbeats.last_seen(self._store.store)
        return ""

    def _report(self, message: str, code: int) -> dict:
        where = self.progress.place
        return {
            "rank": self.launch.rank,
            "host": self.launch.host,
            "place": "" if where == "starting" else f", {where}",
            "message": message,
            "code": code,
        }

    def _leave(self, report: dict, announce: bool = False) -> None:
        if announce:
            of = f"rank {report['rank']} on {report['host']}{report['place']}: " if self.launch.world_size > 1 else ""
            print(f"\nERROR: {of}{report['message']}", file=sys.stderr, flush=True)
        if not self._visits:
            self._mark_failed(report)
        if self.launch.rank == self.host and self.launch.world_size > 1:
            time.sleep(_LINGER_S)
        self._end(report["code"])

    def _die(self, message: str) -> None:
        """End this rank, and with it its client, while the others go on. Does not return."""
        client = self.heartbeats.own().client
        report = self._report(message, FAILURE_CODE)
        print(
            f"\nERROR: client {client} ends, rank {report['rank']} on {report['host']}{report['place']}: {message}",
            file=sys.stderr,
            flush=True,
        )
        self._mark_failed(report, f"FAILED_client_{client:03d}")
        sys.stdout.flush()
        # not an exit: mpirun lets the others go on after a process that died, and ends them after one that failed
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(_LINGER_S)

    def _mark_failed(self, report: dict, name: str = "FAILED") -> None:
        if self.output is None or not self.output.is_dir():
            return
        with contextlib.suppress(OSError), open(self.output / name, "x") as marker:
            marker.write(f"rank {report['rank']} on {report['host']}{report['place']}\n{report['message']}\n")

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

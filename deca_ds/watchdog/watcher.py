"""The thread that watches the job for this rank, through a connection of its own to the job's store.

When the store moves, another thread takes over. A second thread counts for how long the store gives no answer
(store_watch.py). Each of them may end this process; the lock `Ending.begun` lets only one of a rank's threads do so.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import NamedTuple, NoReturn

from torch.distributed import Store

from deca_ds.errors import FAILURE_CODE, CutOffError
from deca_ds.launch import Launch
from deca_ds.launch.progress import Progress
from deca_ds.launch.store import JobStore
from deca_ds.launch.store_site import StoreSite
from deca_ds.launch.view import View
from deca_ds.watchdog.early_end import EarlyEnd
from deca_ds.watchdog.ending import Ending
from deca_ds.watchdog.failure import Failure, note_leaving, rank_is_gone
from deca_ds.watchdog.heartbeats import Heartbeats
from deca_ds.watchdog.look import Look
from deca_ds.watchdog.role import Event, Outcome, Role
from deca_ds.watchdog.standing import Standing
from deca_ds.watchdog.store_watch import StoreWatch, no_answer

_POLL_S, _STOPPING_POLL_S = 0.5, 0.05
_LEARNS_S = 5.0  # for a main thread to learn by itself that its client is out
_NO_ANSWER_S = 1.0  # for a failure that is being reported to a store that does not answer


class _Watch(NamedTuple):
    """The thread that watches the job through a store, and the watch that counts how long the store is silent."""

    thread: threading.Thread
    silence: StoreWatch


class Watcher:
    """Watches the job from its construction until `close`. fail: see Look."""

    def __init__(
        self,
        launch: Launch,
        site: StoreSite,
        heartbeats: Heartbeats,
        standing: Standing,
        ending: Ending,
        early_end: EarlyEnd,
        look: Look,
        fail: Callable[[BaseException], None],
    ):
        self._launch, self._site, self._heartbeats, self._look = launch, site, heartbeats, look
        self._standing, self._ending, self._early_end, self._fail = standing, ending, early_end, fail
        self._finished = threading.Event()
        self._watch = self._start()

    def close(self) -> None:
        """Stop watching: this rank is done."""
        self._finished.set()
        self._watch.silence.close()  # the thread may wait for ever for another one that ends this process
        self._watch.thread.join(timeout=2 * _POLL_S)

    def follow(self, before: View, view: View) -> None:
        """Watch through the store that the view announces. See Membership.subscribe."""
        if view.announcement:
            self._site.move(view.announcement, self._standing.ranks()[0])
            self._watch.silence.close()
            self._watch = self._start()

    @property
    def _progress(self) -> Progress:
        return self._heartbeats.progress

    def _start(self) -> _Watch:
        job = self._site.store
        silence = StoreWatch(self._progress, job.timeout.total_seconds(), self._no_answer, self._standing.grace_s)
        run = self._watch_others if self._launch.world_size > 1 else self._watch_alone
        thread = threading.Thread(target=run, args=(job, job.reconnect(), silence), daemon=True)
        thread.start()
        return _Watch(thread, silence)

    def _watch_alone(self, job: JobStore, store: Store, silence: StoreWatch) -> None:
        """Watch as the only rank of a job, whose store is in its own memory."""
        silence.close()
        while not self._finished.wait(_POLL_S):
            if (report := self._look.alone(store)) is not None:
                self._leave(report)
            self._look_for_stop(store)

    def _watch_others(self, job: JobStore, store: Store, silence: StoreWatch) -> None:
        while self._site.store is job and not self._finished.wait(self._pause_s()):
            self._leave_if_out()
            try:
                self._look_for_stop(store)
                report = self._look.among_others(store)
                silence.answered()
            except RuntimeError:
                if self._finished.is_set():
                    break
                report = self._lost_store()
            except Exception as error:  # without its watcher a rank could wait for ever
                report = self._look.tell(self._ending.report(f"the watcher has failed: {error!r}", FAILURE_CODE), store)
            if report is not None:
                self._leave(report, store)
        silence.close()

    def _pause_s(self) -> float:
        return _STOPPING_POLL_S if self._standing.stop.pending else _POLL_S

    def _look_for_stop(self, store: Store) -> None:
        self._standing.stop.look(store)
        if self._standing.stop.ends_early:
            self._early_end.watch(store)
            self._finished.wait()

    def _leave_if_out(self) -> None:
        """End this rank if the others have dropped its client and the main thread hangs, so that it does not notice."""
        hangs = time.monotonic() - self._progress.moved > (self._progress.timeout_s or 0.0)
        if hangs and self._standing.is_cut_off() and not self._finished.wait(_LEARNS_S):
            self._fail(
                CutOffError(
                    "this client is out of the job, and its main thread hangs",
                    where=self._progress.place,
                    fix="look at what its main thread does there, and at the disks and the network that it uses",
                )
            )

    def _lost_store(self) -> Failure | None:
        """Return why this rank has to end without the store, or None if the survivors will open another one."""
        if self._standing.outcome(Event.STORE_GONE) is Outcome.WAIT:
            return None
        self._leave_a_lost_job(Event.STORE_GONE)
        why = "it ended without a report"
        why += ", before this client was let in: join again" if self._standing.role is Role.REJOINING else ""
        ((who, when),) = self._heartbeats.other_end(None, self._site.host)
        return self._ending.report(rank_is_gone(who, when, why), FAILURE_CODE)

    def _no_answer(self, idle_s: float, silent_s: float) -> None:
        """End this rank because the store is silent; StoreWatch calls this in its thread."""
        silence = no_answer(self._site.host, self._progress.place, idle_s, silent_s)
        self._leave_a_lost_job(Event.STORE_SILENT)
        # the main thread may have begun to report a failure to the silent store, and would never finish
        self._leave(self._ending.report(str(silence), silence.code), within_s=_NO_ANSWER_S)

    def _leave_a_lost_job(self, event: Event) -> None:
        """End in order if the job has, without this rank; or come back, if that is what this rank does at the event;
        otherwise return."""
        if (told := self._standing.told_over()) is not None:
            self._ending.begun.acquire()
            self._ending.end_in_order(told)
        if self._standing.outcome(event) is Outcome.COME_BACK:
            self._ending.begun.acquire()
            self._ending.come_back("has lost the job before it was let in", self._standing.return_s)

    def _leave(self, report: Failure, store: Store | None = None, within_s: float = -1.0) -> NoReturn:
        """End this process. store: where to note that. within_s: seconds after which to end it even if another thread
        has begun to and has not finished; negative waits without a limit."""
        self._ending.begun.acquire(timeout=within_s)
        if store is not None:
            with contextlib.suppress(RuntimeError):  # it is gone
                note_leaving(self._launch.rank, store)
        self._ending.leave(report, mark=self._standing.ends_the_run)

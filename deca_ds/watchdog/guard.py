"""Every rank's failure ends the whole job within seconds and names itself.

The first rank that fails writes its message to the job's store. A thread in every other rank sees it there and ends its
process, whatever the process waits for (a collective, a message, a slow disk). The job leaves a FAILED marker with the
message of that first rank (ending.py), or a DONE marker. The same thread sends this rank's heartbeats and ends waits
that last too long (heartbeats.py). It ends this process as well when the store no longer answers (store_watch.py).

What a failure leads to depends on the rank's role (role.py). With cluster.on_failure=continue, from the first step on,
a rank that fails reports that on its own output and in FAILED_client_NNN and kills itself, as the MPI library expects
of dead ranks. The store may be lost with its host; the survivors then open another one. A rank that hangs, or waits too
long for other ranks of its client, ends that client; over torch the others also drop it if its process does not run.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from torch.distributed import Store

from deca_ds.errors import (
    FAILURE_CODE,
    CutOffError,
    MessageError,
    RankLostError,
    StallError,
    exit_code,
    whole_message,
)
from deca_ds.launch import Launch
from deca_ds.launch.progress import SHARED, Progress
from deca_ds.launch.store import JobStore
from deca_ds.launch.store_site import StoreSite
from deca_ds.launch.view import View
from deca_ds.watchdog.ancestors import Ancestors
from deca_ds.watchdog.early_end import EarlyEnd, StopBeforeTraining
from deca_ds.watchdog.ending import Ending, end_process
from deca_ds.watchdog.failure import Failure, rank_is_gone
from deca_ds.watchdog.heartbeats import FOLDER as HEARTBEATS
from deca_ds.watchdog.heartbeats import Heartbeats
from deca_ds.watchdog.role import Elasticity, Event, Outcome, Role, Visitor, on_event
from deca_ds.watchdog.stop import StopByCommit, StopByStore, is_requested
from deca_ds.watchdog.store_watch import StoreWatch, no_answer
from deca_ds.watchdog.survey import Survey

_DONE_KEY, _EARLY_KEY = "job/done", "job/early"
_POLL_S, _STOPPING_POLL_S = 0.5, 0.05
_CUT_OFF_S = 5.0  # for a rank that has lost another one of its client to notice that the client is cut off
_NO_ANSWER_S = 1.0  # for a failure that is being reported to a store that does not answer
_OTHERS_S = 60.0  # for the survivors to drop a client that hangs and to open another store, before the job ends


class _Watch(NamedTuple):
    """The thread that watches the job through a store, and what counts for how long that gives no answer."""

    thread: threading.Thread
    silence: StoreWatch


class JobGuard:
    """Watches the job for this rank. visitor: for a client that comes back and is not a member yet.

    site: where the job's store is. stop: how a request to stop reaches all ranks, and after which step they stop.
    """

    def __init__(self, launch: Launch, store: JobStore, visitor: Visitor | None = None):
        self.launch = launch
        self.site = StoreSite(launch, store, launch.first if visitor is None else visitor.host)
        self.heartbeats = Heartbeats(launch, self._ranks, store.progress)
        self._survey = Survey(self.heartbeats)
        timeout_s = store.timeout.total_seconds()
        self.stop: StopByStore | StopByCommit = StopByStore(launch.rank, launch.world_size, timeout_s)
        self._role = Role.MEMBER if visitor is None else Role.VISITOR
        self._return_s = 0.0 if visitor is None else visitor.return_s
        self._elasticity: Elasticity | None = None
        self._ancestors = Ancestors()
        self._finished = threading.Event()
        self._ending = Ending(launch, self.site, self.heartbeats)
        met = partial(self._meet, key=_EARLY_KEY, waits=True)
        self.early_end = EarlyEnd(self._ending.begun, met, self._end_early)
        self._watch = self._start_watching()

    @property
    def progress(self) -> Progress:
        """Where this rank's main thread notes what it does."""
        return self.heartbeats.progress

    @property
    def store(self) -> JobStore:
        """The job's, wherever it is now."""
        return self.site.store

    @property
    def output(self) -> Path | None:
        """The run's folder, as soon as it is ours to write to."""
        return self._ending.output

    def write_to(self, output: Path) -> None:
        """The run's folder is known, and ours to write to."""
        self._ending.write_to(output)
        self.heartbeats.write_to(output / HEARTBEATS)

    def on_exit(self, callback: Callable[[], None]) -> None:
        """Have `callback` called when this rank is through, so that nobody takes its end for a death."""
        self._ending.at_exit.append(callback)

    def enter_elastic(self, elasticity: Elasticity) -> None:
        """The ranks of this job are connected so that it can go on without those who fail, as soon as all of them
        `let_others_go_on`."""
        self._elasticity = elasticity
        self.stop, self._return_s = elasticity.stop, max(self._return_s, elasticity.return_s)
        elasticity.membership.subscribe(self._follow_the_store)

    def let_others_go_on(self) -> None:
        """From now on a failure of this rank ends its own client alone. Comes after `enter_elastic`."""
        if self._elasticity is None or not self._role.may_become(Role.OUTLIVED):
            raise RuntimeError(f"a {self._role.name} of a job that is not elastic, or goes on already")
        self._role = Role.OUTLIVED

    def let_stop_before_training(self, tell: Callable[[], None]) -> None:
        """Of all ranks, where they are, if SIGUSR1 calls `hear`. tell: what to do then."""
        self.early_end.expect(tell)
        self.stop.let_end_early()

    def hear(self, *_: Any) -> None:
        """A signal handler: have the job stop. Raises StopBeforeTraining, once, if all have agreed to before that."""
        self.stop.ask()
        if self.stop.ends_early:
            self.early_end.interrupt()

    def _end_early(self, store: Store) -> NoReturn:
        self._meet(store, _DONE_KEY, waits=self.launch.rank == self.site.host)
        end_process(0)

    def fail(self, error: BaseException) -> None:
        """Report `error`, unless another rank was first, and end this process. Does not return."""
        self.early_end.forbid()
        self._ending.begun.acquire()
        match self._outcome(self._event(error)):
            case Outcome.COME_BACK:
                self.come_back(f"was cut off: {error}")
            case Outcome.COME_BACK_UNNOTICED:
                self.come_back(f"hangs: {error}", through=False)
            case Outcome.END_THE_CLIENT:
                self._ending.end_the_client(error)
            case Outcome.END:
                self._leave(self._ending.report(whole_message(error), exit_code(error)))
            case _:
                self._ending.end_the_job(error)

    def come_back(self, why: str, *, through: bool = True) -> NoReturn:
        """Become a new process that tries to join the others again. through: whether the others hear that this rank is
        through, by `on_exit`."""
        self._ending.come_back(why, self._return_s, through=through)

    def _outcome(self, event: Event) -> Outcome:
        return on_event(self._role, event, self._return_s > 0)

    def _event(self, error: BaseException) -> Event:
        """What `error` means for this rank."""
        if isinstance(error, CutOffError):
            return Event.CUT_OFF
        if isinstance(error, StallError):
            return Event.HANGS
        # another rank of this client may know already: then what broke here is the connection to that one
        of_a_connection = isinstance(error, (MessageError, RankLostError, RuntimeError))
        may_be_cut_off = of_a_connection and self._outcome(Event.CUT_OFF) != self._outcome(Event.ERROR)
        return Event.CUT_OFF if may_be_cut_off and self._is_cut_off(_CUT_OFF_S) else Event.ERROR

    def _is_cut_off(self, within_s: float) -> bool:
        return self._role is Role.OUTLIVED and self._elasticity is not None and self._elasticity.cut_off.wait(within_s)

    def finish(self) -> None:
        """Stop watching: every rank is through. The store's host leaves last. After a death, ends this process."""
        self.early_end.forbid()
        self.progress.enter("done")
        for callback in self._ending.at_exit:
            callback()
        store = self.store.store
        # one that dies now, all being through, is nobody's concern
        with contextlib.suppress(RuntimeError) if self._role is Role.OUTLIVED else contextlib.nullcontext():
            self._meet(store, _DONE_KEY, waits=self.launch.rank == self.site.host)
        self._finished.set()
        self._watch.thread.join(timeout=2 * _POLL_S)
        self.heartbeats.beat(store, last=True)
        if self._view_has_changed:
            end_process(0)  # MPI_Finalize, an exit handler, may wait for the dead for ever
        gc.freeze()  # or the interpreter would look for garbage in everything, several times: a second of each rank

    def _meet(self, store: Store, key: str, *, waits: bool) -> None:
        """Tell that this rank is here. waits: until all are."""
        store.add(key, 1)
        deadline = time.monotonic() + self.store.timeout.total_seconds()
        while waits and store.add(key, 0) < len(self._ranks()) and time.monotonic() < deadline:
            time.sleep(0.05)

    @property
    def _view_has_changed(self) -> bool:
        """Whether somebody has gone or come since the start."""
        return self._elasticity is not None and self._elasticity.membership.view.number > 0

    def _ranks(self) -> Sequence[int]:
        """Those that are in, and use the store."""
        if self._elasticity is None or not self._view_has_changed:
            return self.launch.ranks
        return self._elasticity.membership.view.ranks(self._elasticity.layout)

    def _follow_the_store(self, before: View, view: View) -> None:
        """See Membership.subscribe: the host of the old store may have gone."""
        if view.announcement:
            self.site.move(view.announcement, self._ranks()[0])
            self._watch.silence.close()
            self._watch = self._start_watching()

    def _start_watching(self) -> _Watch:
        timeout_s = self.store.timeout.total_seconds()
        silence = StoreWatch(self.progress, timeout_s, self._no_answer, self._store_grace_s)
        watch = self._watch_others if self.launch.world_size > 1 else self._beat
        arguments = self.store, self.store.reconnect(), silence
        thread = threading.Thread(target=watch, args=arguments, daemon=True)
        thread.start()
        return _Watch(thread, silence)

    def _store_grace_s(self) -> float:
        """For the others to put up another store."""
        return 0.0 if self._role is Role.MEMBER else _OTHERS_S

    def _beat(self, job: JobStore, store: Store, silence: StoreWatch) -> None:
        """All that there is to do for a single rank."""
        silence.close()
        while not self._finished.wait(_POLL_S):
            if (report := self._look_at_launcher()) is not None:
                self._ending.begun.acquire()
                self._leave(report)
            self._look_for_stop(store)
            if self.heartbeats.beat(store):
                self._hear_request()

    def _watch_others(self, job: JobStore, store: Store, silence: StoreWatch) -> None:
        while self.store is job and not self._finished.wait(_STOPPING_POLL_S if self.stop.pending else _POLL_S):
            self._leave_if_out()
            try:
                self._look_for_stop(store)
                report = self._look(store)
                silence.answered()
            except RuntimeError:
                if self._finished.is_set():
                    break
                if self._outcome(Event.STORE_GONE) is Outcome.WAIT:
                    continue  # the survivors will put up another one
                self._come_back_to_a_lost_job(Event.STORE_GONE)
                why = "it ended without a report"
                why += ", before this client was let in: join again" if self._role is Role.VISITOR else ""
                ((who, when),) = self.heartbeats.other_end(None, self.site.host)
                report = self._ending.report(rank_is_gone(who, when, why), FAILURE_CODE)
            except Exception as error:  # without its watcher a rank could wait for ever
                report = self._ending.report(f"the watcher has failed: {error!r}", FAILURE_CODE)
            if report is not None:
                self._ending.begun.acquire()
                self._leave(report)
        silence.close()

    def _leave_if_out(self) -> None:
        """The others have put this client out, and the main thread, which may hang, does not come to learn of it."""
        hangs = time.monotonic() - self.progress.moved > (self.progress.timeout_s or 0.0)
        if hangs and self._is_cut_off(0.0) and not self._finished.wait(_CUT_OFF_S):
            self.fail(CutOffError("this client is out of the job, and its main thread hangs"))

    def _no_answer(self, idle_s: float, silent_s: float) -> None:
        silence = no_answer(self.site.host, self.progress.place, idle_s, silent_s)
        self._come_back_to_a_lost_job(Event.STORE_SILENT)
        # the main thread may have taken it, to tell the store what that will never hear
        self._ending.begun.acquire(timeout=_NO_ANSWER_S)
        self._leave(self._ending.report(str(silence), silence.code))

    def _come_back_to_a_lost_job(self, event: Event) -> None:
        """Returns if that is not what this rank does."""
        if self._outcome(event) is Outcome.COME_BACK:
            self._ending.begun.acquire()
            self.come_back("has lost the job before it was let in")

    def _look(self, store: Store) -> Failure | None:
        """A reason to end this process, if there is one."""
        if (report := self._look_at_launcher()) is not None:
            return report
        if (reported := Failure.reported(store)) is not None:
            return reported
        if not self.heartbeats.beat(store):
            return None
        self._hear_request()
        if self.launch.rank == self.site.host:
            self._survey.publish(store)
        stall = self.heartbeats.stalled(store, own=self._role is Role.OUTLIVED)
        if stall is None or self._others_see_to(stall):
            return None
        report = self._ending.report(str(stall), stall.code)
        return report if self._role is Role.VISITOR else report.report(store)

    def _look_at_launcher(self) -> Failure | None:
        why = self._ancestors.look(self.launch, self.stop)
        return None if why is None else self._ending.report(why, FAILURE_CODE)

    def _look_for_stop(self, store: Store) -> None:
        self.stop.look(store)
        if self.stop.ends_early:
            self.early_end.watch(store)
            self._finished.wait()

    def _hear_request(self) -> None:
        if self.output is not None and is_requested(self.output):
            self.stop.ask()

    def _others_see_to(self, stall: StallError) -> bool:
        """Whether the job can go on without whoever hangs. Does not return if that is of this rank's client."""
        if self._role is Role.MEMBER or stall.idle_s > (self.progress.timeout_s or 0.0) + _OTHERS_S:
            return False
        if self._role is Role.OUTLIVED and stall.clients == {self.heartbeats.own().client}:
            self.fail(stall)
        put_out = None if self._elasticity is None else self._elasticity.put_out_who_hangs
        if self.progress.awaits not in (None, SHARED) and put_out is not None:
            put_out()
        return True

    def _leave(self, report: Failure) -> None:
        self._ending.leave(report, mark=self._role is not Role.VISITOR)


@contextlib.contextmanager
def guarded(launch: Launch, store: JobStore, visitor: Visitor | None = None) -> Iterator[JobGuard]:
    """Run the body under a `JobGuard`: any exception in it ends the job, its end is waited for on all ranks."""
    guard = JobGuard(launch, store, visitor)
    try:
        yield guard
    except StopBeforeTraining:
        guard.early_end.end(guard.store.store)
    except BaseException as error:
        guard.fail(error)
    guard.finish()

"""What this rank's watcher checks every half second: whether there is a reason to end this process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from torch.distributed import Store

from deca_ds.errors import FAILURE_CODE, StallError
from deca_ds.launch import Launch
from deca_ds.launch.progress import SHARED
from deca_ds.launch.store_site import StoreSite
from deca_ds.watchdog.ancestors import Ancestors
from deca_ds.watchdog.ending import Ending
from deca_ds.watchdog.failure import Failure
from deca_ds.watchdog.heartbeats import Heartbeats
from deca_ds.watchdog.role import Event, Outcome, Role
from deca_ds.watchdog.standing import Standing
from deca_ds.watchdog.stop import is_requested
from deca_ds.watchdog.survey import Survey


class Look:
    """The checks of the watcher thread. fail: ends this rank as its role says for an error (guard.py)."""

    def __init__(
        self,
        launch: Launch,
        site: StoreSite,
        heartbeats: Heartbeats,
        standing: Standing,
        ending: Ending,
        ancestors: Ancestors,
        fail: Callable[[BaseException], None],
    ):
        self._launch, self._site, self._heartbeats = launch, site, heartbeats
        self._standing, self._ending, self._ancestors, self._fail = standing, ending, ancestors, fail
        self._survey = Survey(heartbeats)

    def alone(self, store: Store) -> Failure | None:
        """Send the heartbeat of a job's only rank, and return why the rank has to end, if its launcher is gone."""
        report = self._lost_launcher()
        if report is None and self._heartbeats.beat(store):
            self._hear_request()
        return report

    def among_others(self, store: Store) -> Failure | None:
        """Send this rank's heartbeat, and return why it has to end: its launcher is gone, another rank has failed, or a
        wait has lasted too long."""
        lost = self._lost_launcher()
        report = Failure.reported(store) if lost is None else self.tell(lost, store)
        if report is not None or not self._heartbeats.beat(store):
            return report
        self._hear_request()
        if self._launch.rank == self._site.host:
            self._survey.publish(store)
        stall = self._heartbeats.stalled(store, own=self._standing.role is Role.OUTLIVED)
        return None if stall is None else self._of_stall(store, stall)

    def tell(self, report: Failure, store: Store) -> Failure:
        """Report this rank's failure to the others if their job ends with this rank: they would take its end for the
        reason. Returns the first failure that was reported, or `report`."""
        if self._standing.outcome(Event.ERROR) is Outcome.END_THE_JOB:
            with suppress(RuntimeError):  # the store is gone
                return report.report(store)
        return report

    def _lost_launcher(self) -> Failure | None:
        why = self._ancestors.look(self._launch, self._standing.stop)
        return None if why is None else self._ending.report(why, FAILURE_CODE)

    def _hear_request(self) -> None:
        if self._ending.output is not None and is_requested(self._ending.output):
            self._standing.stop.ask()

    def _of_stall(self, store: Store, stall: StallError) -> Failure | None:
        progress, own = self._heartbeats.progress, self._heartbeats.own().client
        match self._standing.outcome(self._standing.event_of_stall(stall, own, progress.timeout_s or 0.0)):
            case Outcome.WAIT:
                if progress.awaits not in (None, SHARED):
                    self._standing.drop_hanging()
                return None
            case Outcome.END:
                return self._ending.report(str(stall), stall.code)
            case Outcome.END_THE_JOB:
                return self._ending.report(str(stall), stall.code).report(store)
            case _:
                self._fail(stall)
                return None

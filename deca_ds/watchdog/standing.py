"""This rank's standing in its job: its role, as it changes, the other members, and what an event means to it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from deca_ds.errors import CutOffError, MessageError, RankLostError, StallError
from deca_ds.launch import ClientLayout, Launch
from deca_ds.launch.view import Membership
from deca_ds.watchdog.patience import USUAL, Patience
from deca_ds.watchdog.role import Event, Outcome, Role, on_event
from deca_ds.watchdog.stop import StopByCommit, StopByStore


@dataclass(frozen=True)
class Rejoining:
    """How a client comes back. host: the rank that hosts the job's store. return_s: seconds that it still tries for.
    told_over: gives what this rank prints if the job has ended in order without it; None as long as that is not
    certain."""

    host: int
    return_s: float = 0.0
    told_over: Callable[[], str | None] = lambda: None


@dataclass(frozen=True)
class Elasticity:
    """What a rank knows of a job in which clients may die and come back.

    membership: the clients in the job. stop: how the job is told to stop, and after which step. return_s:
    cluster.return_s. cut_off: set when this client is out of the job or cannot reach the others. drop_hanging: has the
    others drop hanging clients, if it is called every second while no rank makes progress; None over a transport that
    cannot drop them.
    """

    membership: Membership
    layout: ClientLayout
    stop: StopByCommit
    return_s: float = 0.0
    cut_off: threading.Event = field(default_factory=threading.Event)
    drop_hanging: Callable[[], None] | None = None


class Standing:
    """This rank's role, and the questions whose answers depend on it. All threads read it; the main thread changes it.

    rejoining: given if this rank's client comes back. stop: how the job is told to stop before `enter_elastic`.
    return_s: seconds for which this rank would try to come back; 0 if it would not.
    """

    def __init__(self, launch: Launch, rejoining: Rejoining | None, stop: StopByStore, patience: Patience = USUAL):
        self.role = Role.MEMBER if rejoining is None else Role.REJOINING
        self.return_s = 0.0 if rejoining is None else rejoining.return_s
        self._launch, self._rejoining, self._stop, self._patience = launch, rejoining, stop, patience
        self._elasticity: Elasticity | None = None

    def enter_elastic(self, elasticity: Elasticity) -> None:
        """Note that this job survives the failure of a client once all its ranks have called `let_others_go_on`."""
        self._elasticity = elasticity
        self.return_s = max(self.return_s, elasticity.return_s)

    def let_others_go_on(self) -> None:
        """Make this rank's role OUTLIVED. To be called once, after `enter_elastic`."""
        if self._elasticity is None or not self.role.may_become(Role.OUTLIVED):
            raise RuntimeError(f"a {self.role.name} of a job that is not elastic, or is so already")
        self.role = Role.OUTLIVED

    @property
    def ends_the_run(self) -> bool:
        """Whether the run has failed when this rank has; not where the rank's client has not been let in yet."""
        return self.role is not Role.REJOINING

    def told_over(self) -> str | None:
        """Return what this rank prints where its client has not been let in, because the job has ended in order without
        it; None elsewhere."""
        return self._rejoining.told_over() if self._rejoining and self.role is Role.REJOINING else None

    @property
    def stop(self) -> StopByStore | StopByCommit:
        """How the job is told to stop, and after which step it stops."""
        return self._stop if self._elasticity is None else self._elasticity.stop

    @property
    def view_has_changed(self) -> bool:
        """Whether a client has left or joined since the start."""
        return self._elasticity is not None and self._elasticity.membership.view.number > 0

    def ranks(self) -> Sequence[int]:
        """Return the ranks that are in the job and use its store."""
        if self._elasticity is None or not self.view_has_changed:
            return self._launch.ranks
        return self._elasticity.membership.view.ranks(self._elasticity.layout)

    def is_cut_off(self, within_s: float = 0.0) -> bool:
        """Return whether this rank is OUTLIVED and its client is out of the job. Waits up to `within_s` seconds for
        that."""
        return self.role is Role.OUTLIVED and self._elasticity is not None and self._elasticity.cut_off.wait(within_s)

    def drop_hanging(self) -> None:
        """Have the others drop the clients that make no progress, if they can."""
        if self._elasticity is not None and self._elasticity.drop_hanging is not None:
            self._elasticity.drop_hanging()

    def grace_s(self) -> float:
        """Return how many seconds the survivors may take to drop a hanging client or to open another store."""
        return 0.0 if self.role is Role.MEMBER else self._patience.others_s

    def outcome(self, event: Event) -> Outcome:
        """Return what this rank does at the event, by its role now."""
        return on_event(self.role, event, self.return_s > 0)

    def event_of(self, error: BaseException) -> Event:
        """Return the event that an error which ends this rank is. May wait until another thread learns that the client
        is out."""
        if isinstance(error, CutOffError):
            return Event.CUT_OFF
        if isinstance(error, StallError):
            return Event.HANGS
        # another rank of this client may know already: then what broke here is the connection to that one
        may_be_cut_off = of_a_connection(error) and self.outcome(Event.CUT_OFF) != self.outcome(Event.ERROR)
        return Event.CUT_OFF if may_be_cut_off and self.is_cut_off(self._patience.cut_off_s) else Event.ERROR

    def event_of_stall(self, stall: StallError, client: int | None, timeout_s: float) -> Event:
        """Return the event that a stall is to this rank. client: this rank's own. timeout_s: cluster.timeout_s."""
        if stall.idle_s > timeout_s + self.grace_s():
            return Event.STILL_HANG
        return Event.HANGS if stall.clients == {client} else Event.OTHERS_HANG


def of_a_connection(error: BaseException) -> bool:
    """Return whether `error` may come from a connection to another rank or to the job's store."""
    return isinstance(error, (MessageError, RankLostError, RuntimeError))

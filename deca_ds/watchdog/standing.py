"""This rank's standing in its job: its role, as it changes, who else is in, and what that makes of an event."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from deca_ds.errors import CutOffError, MessageError, RankLostError, StallError
from deca_ds.launch import ClientLayout, Launch
from deca_ds.launch.view import Membership
from deca_ds.watchdog.role import Event, Outcome, Role, on_event
from deca_ds.watchdog.stop import StopByCommit, StopByStore

_CUT_OFF_S = 5.0  # for a rank that has lost another one of its client to notice that the client is cut off
_OTHERS_S = 60.0  # for the survivors to drop a client that hangs and to open another store, before the job ends


@dataclass(frozen=True)
class Rejoining:
    """Of a client that comes back. host: the rank that hosts the job's store. return_s: for how long it still tries."""

    host: int
    return_s: float = 0.0


@dataclass(frozen=True)
class Elasticity:
    """What a job has in which clients may go and come.

    membership: who is in. stop: how it is told to stop, and where. return_s: cluster.return_s. cut_off: set when this
    client is out, or the others are out of its reach. drop_hanging: to be called every second while nobody in the
    job moves on; None where the others cannot put a client out.
    """

    membership: Membership
    layout: ClientLayout
    stop: StopByCommit
    return_s: float = 0.0
    cut_off: threading.Event = field(default_factory=threading.Event)
    drop_hanging: Callable[[], None] | None = None


class Standing:
    """All threads of the rank read it; its main thread changes it.

    rejoining: of a client that comes back. stop: how the job is told to stop, until it `enter_elastic`.
    """

    def __init__(self, launch: Launch, rejoining: Rejoining | None, stop: StopByStore):
        self.role = Role.MEMBER if rejoining is None else Role.REJOINING
        self.return_s = 0.0 if rejoining is None else rejoining.return_s
        self._launch, self._stop = launch, stop
        self._elasticity: Elasticity | None = None

    def enter_elastic(self, elasticity: Elasticity) -> None:
        """The ranks of this job can continue without those who fail, as soon as all of them `let_others_go_on`."""
        self._elasticity = elasticity
        self.return_s = max(self.return_s, elasticity.return_s)

    def let_others_go_on(self) -> None:
        """From now on this rank is OUTLIVED. Comes once, after `enter_elastic`."""
        if self._elasticity is None or not self.role.may_become(Role.OUTLIVED):
            raise RuntimeError(f"a {self.role.name} of a job that is not elastic, or is so already")
        self.role = Role.OUTLIVED

    @property
    def stop(self) -> StopByStore | StopByCommit:
        """How the job is told to stop, and where."""
        return self._stop if self._elasticity is None else self._elasticity.stop

    @property
    def view_has_changed(self) -> bool:
        """Whether somebody has gone or come since the start."""
        return self._elasticity is not None and self._elasticity.membership.view.number > 0

    def ranks(self) -> Sequence[int]:
        """Those that are in, and use the store."""
        if self._elasticity is None or not self.view_has_changed:
            return self._launch.ranks
        return self._elasticity.membership.view.ranks(self._elasticity.layout)

    def is_cut_off(self, within_s: float = 0.0) -> bool:
        """Whether its client, which the others outlive, is out, or learns that within so many seconds."""
        return self.role is Role.OUTLIVED and self._elasticity is not None and self._elasticity.cut_off.wait(within_s)

    def drop_hanging(self) -> None:
        """Have the others drop whoever does not move on, where they can."""
        if self._elasticity is not None and self._elasticity.drop_hanging is not None:
            self._elasticity.drop_hanging()

    def grace_s(self) -> float:
        """How long the others may take to continue without a client that hangs, or whose host had the store."""
        return 0.0 if self.role is Role.MEMBER else _OTHERS_S

    def outcome(self, event: Event) -> Outcome:
        """What it leads to for this rank now."""
        return on_event(self.role, event, self.return_s > 0)

    def event_of(self, error: BaseException) -> Event:
        """What an error that ends this rank is to it. May wait for another thread to learn that the client is out."""
        if isinstance(error, CutOffError):
            return Event.CUT_OFF
        if isinstance(error, StallError):
            return Event.HANGS
        # another rank of this client may know already: then what broke here is the connection to that one
        of_a_connection = isinstance(error, (MessageError, RankLostError, RuntimeError))
        may_be_cut_off = of_a_connection and self.outcome(Event.CUT_OFF) != self.outcome(Event.ERROR)
        return Event.CUT_OFF if may_be_cut_off and self.is_cut_off(_CUT_OFF_S) else Event.ERROR

    def event_of_stall(self, stall: StallError, client: int | None, timeout_s: float) -> Event:
        """What it is to this rank that it, or ranks that it waits for, do not move on. client: its own."""
        if stall.idle_s > timeout_s + self.grace_s():
            return Event.STILL_HANG
        return Event.HANGS if stall.clients == {client} else Event.OTHERS_HANG

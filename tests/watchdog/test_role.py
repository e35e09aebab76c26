"""What becomes of a rank, by what it is to the job and what happens to it: every case."""

from __future__ import annotations

from datetime import timedelta

import pytest
from torch.distributed import HashStore

from deca_ds.launch.launcher import ClientLayout, Launch
from deca_ds.launch.store import JobStore
from deca_ds.launch.view import Membership, View
from deca_ds.watchdog.guard import JobGuard
from deca_ds.watchdog.role import Elasticity, Event, Outcome, Role, Visitor, on_event
from deca_ds.watchdog.stop import StopByCommit

# without cluster.return_s, and with it
CASES = {
    (Role.MEMBER, Event.ERROR): (Outcome.END_THE_JOB, Outcome.END_THE_JOB),
    (Role.MEMBER, Event.CUT_OFF): (Outcome.END_THE_JOB, Outcome.END_THE_JOB),
    (Role.MEMBER, Event.HANGS): (Outcome.END_THE_JOB, Outcome.END_THE_JOB),
    (Role.MEMBER, Event.STORE_GONE): (Outcome.END, Outcome.END),
    (Role.MEMBER, Event.STORE_SILENT): (Outcome.END, Outcome.END),
    (Role.VISITOR, Event.ERROR): (Outcome.END, Outcome.END),
    (Role.VISITOR, Event.CUT_OFF): (Outcome.END, Outcome.COME_BACK),
    (Role.VISITOR, Event.HANGS): (Outcome.END, Outcome.END),
    (Role.VISITOR, Event.STORE_GONE): (Outcome.END, Outcome.COME_BACK),
    (Role.VISITOR, Event.STORE_SILENT): (Outcome.END, Outcome.COME_BACK),
    (Role.OUTLIVED, Event.ERROR): (Outcome.END_THE_CLIENT, Outcome.END_THE_CLIENT),
    (Role.OUTLIVED, Event.CUT_OFF): (Outcome.END_THE_CLIENT, Outcome.COME_BACK),
    (Role.OUTLIVED, Event.HANGS): (Outcome.END_THE_CLIENT, Outcome.COME_BACK_UNNOTICED),
    (Role.OUTLIVED, Event.STORE_GONE): (Outcome.WAIT, Outcome.WAIT),
    (Role.OUTLIVED, Event.STORE_SILENT): (Outcome.END, Outcome.END),
}


def test_what_becomes_of_a_rank():
    assert CASES.keys() == {(role, event) for role in Role for event in Event}
    found = {case: (on_event(*case, returns=False), on_event(*case, returns=True)) for case in CASES}
    assert found == CASES


def test_a_rank_trains_with_others_that_go_on_without_it_once_and_for_good():
    steps = {(role, becomes) for role in Role for becomes in Role if role.may_become(becomes)}
    assert steps == {(Role.MEMBER, Role.OUTLIVED), (Role.VISITOR, Role.OUTLIVED)}


def guard(visitor: Visitor | None = None) -> JobGuard:
    return JobGuard(Launch("python", 0, 1, 0, None), JobStore(HashStore(), None, timedelta(seconds=100)), visitor)


@pytest.mark.parametrize("visitor", [None, Visitor(host=0)])
def test_a_guard_refuses_what_its_rank_cannot_become(visitor):
    made = guard(visitor)
    with pytest.raises(RuntimeError, match="of a job that is not elastic"):
        made.let_others_go_on()
    made.enter_elastic(Elasticity(Membership(View.of_all(1)), ClientLayout(1, 1), StopByCommit()))
    made.let_others_go_on()
    with pytest.raises(RuntimeError, match="OUTLIVED of a job"):
        made.let_others_go_on()
    made.finish()


def test_a_guard_follows_the_view_and_tells_who_is_through():
    made, membership, stop, told = guard(), Membership(View(0, (0,), 3)), StopByCommit(), []
    assert list(made.heartbeats.ranks()) == [0]
    made.enter_elastic(Elasticity(membership, ClientLayout(3, 2), stop))
    assert list(made.heartbeats.ranks()) == [0], "nobody has agreed on a view yet: what the launcher says"
    assert made.stop is stop
    made.on_exit(lambda: told.append("first"))
    made.on_exit(lambda: told.append("second"))
    made.finish()
    assert told == ["first", "second"]
    membership.change(View(1, (2, 0), 3))
    assert list(made.heartbeats.ranks()) == [4, 5, 0, 1]

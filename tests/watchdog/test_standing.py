"""What this rank is to its job, who is in, and what an error or a standstill is to it; without threads or a store."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from deca_ds.errors import ConfigError, CutOffError, MessageError, RankLostError, StallError
from deca_ds.launch.launcher import ClientLayout, Launch
from deca_ds.launch.store import JobStore
from deca_ds.launch.view import Membership, View
from deca_ds.watchdog.guard import JobGuard
from deca_ds.watchdog.patience import Patience
from deca_ds.watchdog.role import Event, Outcome, Role
from deca_ds.watchdog.standing import Elasticity, Rejoining, Standing
from deca_ds.watchdog.stop import StopByCommit, StopByStore

LAYOUT = ClientLayout(3, 2)


def elasticity(return_s: float = 0.0, **given) -> Elasticity:
    return Elasticity(Membership(View.of_all(3)), LAYOUT, StopByCommit(), return_s, **given)


def standing(role: Role, **given) -> Standing:
    """Of a rank with that role, in a job in which clients may come and go."""
    rejoining = Rejoining(host=0) if role is Role.REJOINING else None
    made = Standing(Launch("deepspeed", 2, 6, 2, None), rejoining, StopByStore(2, 6, 100.0), Patience(cut_off_s=0.0))
    made.enter_elastic(elasticity(**given))
    if role is Role.OUTLIVED:
        made.let_others_go_on()
    return made


@pytest.mark.parametrize("rejoining", [None, Rejoining(host=0)])
def test_what_a_rank_cannot_become_is_refused(rejoining):
    made = Standing(Launch("python", 0, 1, 0, None), rejoining, StopByStore(0, 1, 100.0))
    with pytest.raises(RuntimeError, match="of a job that is not elastic"):
        made.let_others_go_on()
    made.enter_elastic(elasticity())
    made.let_others_go_on()
    with pytest.raises(RuntimeError, match="OUTLIVED of a job"):
        made.let_others_go_on()


def test_the_longer_time_to_come_back_holds():
    made = Standing(Launch("python", 0, 1, 0, None), Rejoining(host=0, return_s=30.0), StopByStore(0, 1, 100.0))
    assert made.outcome(Event.CUT_OFF) is Outcome.COME_BACK
    made.enter_elastic(elasticity(return_s=20.0))
    assert made.return_s == 30.0
    made.enter_elastic(elasticity(return_s=40.0))
    assert made.return_s == 40.0


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("cut_off", [False, True])
def test_a_connection_breaks_because_the_client_is_out_where_another_rank_knows_that(role, cut_off):
    known = threading.Event()
    made = standing(role, return_s=60.0, cut_off=known)
    if cut_off:
        known.set()
    expected = Event.CUT_OFF if cut_off and role is Role.OUTLIVED else Event.ERROR
    for error in (MessageError("x"), RankLostError("x"), RuntimeError("Connection reset by peer")):
        assert made.event_of(error) is expected
    for error in (ConfigError("x"), KeyError("x"), OSError("x")):
        assert made.event_of(error) is Event.ERROR, "of no connection"
    assert made.event_of(CutOffError("x")) is Event.CUT_OFF
    assert made.event_of(StallError("x")) is Event.HANGS


def test_a_rank_does_not_wait_for_what_would_change_nothing():
    """Without cluster.return_s a client that is cut off ends as with any error."""

    class Never(threading.Event):
        def wait(self, timeout=None):
            raise AssertionError("asked")

    assert standing(Role.OUTLIVED, cut_off=Never()).event_of(RuntimeError("x")) is Event.ERROR


@pytest.mark.parametrize(
    ("clients", "idle_s", "event"),
    [
        ({1}, 101.0, Event.HANGS),
        ({0}, 101.0, Event.OTHERS_HANG),
        ({0, 1}, 101.0, Event.OTHERS_HANG),
        ({1}, 160.0, Event.HANGS),
        ({1}, 161.0, Event.STILL_HANG),
        ({0}, 161.0, Event.STILL_HANG),
    ],
)
@pytest.mark.parametrize("role", [Role.REJOINING, Role.OUTLIVED])
def test_whose_standstill_it_is_and_whether_the_others_have_had_their_time(role, clients, idle_s, event):
    stall = StallError("no progress", clients=clients, idle_s=idle_s)
    assert standing(role).event_of_stall(stall, 1, 100.0) is event


def test_a_job_that_ends_as_a_whole_waits_for_no_survivors():
    assert standing(Role.MEMBER).grace_s() == 0.0
    stall = StallError("no progress", clients={0}, idle_s=101.0)
    assert standing(Role.MEMBER).event_of_stall(stall, 1, 100.0) is Event.STILL_HANG


def test_a_hanging_client_is_dropped_where_the_others_can():
    calls: list[str] = []
    standing(Role.OUTLIVED).drop_hanging()
    standing(Role.OUTLIVED, drop_hanging=lambda: calls.append("asked")).drop_hanging()
    assert calls == ["asked"]


def test_a_guard_follows_the_view_and_tells_who_is_through():
    launch, store = Launch("python", 0, 1, 0, None), JobStore(HashStore(), None, timedelta(seconds=100))
    made, membership, stop, told = JobGuard(launch, store), Membership(View(0, (0,), 3)), StopByCommit(), []
    assert list(made.heartbeats.ranks()) == [0]
    assert isinstance(made.stop, StopByStore)
    made.enter_elastic(Elasticity(membership, LAYOUT, stop))
    assert list(made.heartbeats.ranks()) == [0], "nobody has agreed on a view yet: what the launcher says"
    assert made.stop is stop
    made.on_exit(lambda: told.append("first"))
    made.on_exit(lambda: told.append("second"))
    made.finish()
    assert told == ["first", "second"]
    membership.change(View(1, (2, 0), 3))
    assert list(made.heartbeats.ranks()) == [4, 5, 0, 1]

"""What a rank's watcher does about what it finds, by the rank's role: one look at a time, and the thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import timedelta

import pytest
from jobs import wait_until
from torch.distributed import HashStore

from deca_ds.errors import FAILURE_CODE, StallError
from deca_ds.launch.launcher import ClientLayout, Launch
from deca_ds.launch.store import JobStore
from deca_ds.launch.store_site import StoreSite
from deca_ds.launch.view import Membership, View
from deca_ds.watchdog.ancestors import Ancestors
from deca_ds.watchdog.early_end import EarlyEnd
from deca_ds.watchdog.ending import Ending
from deca_ds.watchdog.failure import Failure
from deca_ds.watchdog.heartbeats import Heartbeats
from deca_ds.watchdog.look import Look
from deca_ds.watchdog.role import Role
from deca_ds.watchdog.standing import Elasticity, Rejoining, Standing
from deca_ds.watchdog.stop import StopByCommit, StopByStore, request_stop
from deca_ds.watchdog.watcher import Watcher

LAYOUT = ClientLayout(3, 2)
RANK, CLIENT = 2, 1
LAUNCH = Launch("deepspeed", RANK, 6, RANK, None)


class Parents(Ancestors):
    """All there, until `gone` says otherwise."""

    gone: str | None = None

    def look(self, launch, stop):
        return self.gone


class Standstill(Heartbeats):
    """`stall` is what is found."""

    stall: StallError | None = None

    def stalled(self, store, *, own=False):
        return self.stall


class Noted(Ending):
    """Notes how this process would have ended; its watcher goes on until it is closed."""

    def __init__(self, *parts):
        super().__init__(*parts)
        self.left: list[tuple[Failure, bool]] = []
        self.came_back: list[str] = []
        self.ended_in_order: list[str] = []

    def leave(self, report, *, mark=True):
        self.left.append((report, mark))
        self.begun.release()

    def end_in_order(self, told):
        self.ended_in_order.append(told)
        raise Back

    def come_back(self, why, return_s, *, through=True):
        self.came_back.append(why)
        raise Back


class Back(BaseException):
    """Ends the thread, as becoming a new process does."""


class Parts:
    """Of the guard of one rank of six, without a guard."""

    def __init__(self, role: Role, store: HashStore, return_s: float = 0.0, over: str | None = None):
        self.store, self.failed, self.drops = store, list[BaseException](), list[str]()
        rejoining = Rejoining(0, return_s, lambda: over) if role is Role.REJOINING else None
        self.standing = Standing(LAUNCH, rejoining, StopByStore(RANK, 6, 100.0))
        self.site = StoreSite(LAUNCH, JobStore(store, None, timedelta(seconds=100)), 0)
        self.heartbeats = Standstill(LAUNCH, self.standing.ranks)
        self.heartbeats.progress.watch(LAYOUT, 100.0)
        self.ending, self.parents = Noted(LAUNCH, self.site, self.heartbeats), Parents()
        if role is not Role.MEMBER:
            drops = lambda: self.drops.append("asked")  # noqa: E731
            self.membership = Membership(View.of_all(3))
            made = Elasticity(self.membership, LAYOUT, StopByCommit(), return_s, drop_hanging=drops)
            self.standing.enter_elastic(made)
        if role is Role.OUTLIVED:
            self.standing.let_others_go_on()
        parts = LAUNCH, self.site, self.heartbeats, self.standing, self.ending
        self.look, self.parts = Look(*parts, self.parents, self.failed.append), parts

    def stalls(self, idle_s: float, *clients: int) -> None:
        self.heartbeats.stall = StallError("no progress", clients=clients, idle_s=idle_s)

    def watcher(self) -> Watcher:
        early_end = EarlyEnd(self.ending.begun, lambda store: None, lambda store: None)
        return Watcher(*self.parts, early_end, self.look, self.failed.append)


def test_a_failure_of_another_rank_is_a_reason_to_end_also_where_the_launcher_is_gone():
    made = Parts(Role.MEMBER, HashStore())
    assert made.look.among_others(made.store) is None
    first = Failure(1, "n1", "gradient", "the value is odd", 2)
    first.report(made.store)
    assert made.look.among_others(made.store) == first
    made.parents.gone = "the launcher is gone"
    assert made.look.among_others(made.store) == first


@pytest.mark.parametrize("role", Role)
def test_a_launcher_that_is_gone_is_a_reason_to_end_for_all_whose_job_ends_with_this_rank(role):
    """Without the report, another rank may see this one's end first, and take that for the reason."""
    made = Parts(role, HashStore())
    made.parents.gone = "the launcher is gone"
    report = made.look.among_others(made.store)
    assert (report.rank, report.message, report.code) == (RANK, "the launcher is gone", FAILURE_CODE)
    assert Failure.reported(made.store) == (report if role is Role.MEMBER else None)
    assert made.look.alone(made.store) == report


@pytest.mark.parametrize("look", [Look.alone, Look.among_others])
def test_a_look_beats_and_hears_a_request_to_stop(look, tmp_path):
    made = Parts(Role.MEMBER, HashStore())
    made.ending.write_to(tmp_path)
    request_stop(tmp_path)
    assert look(made.look, made.store) is None
    assert made.store.check([f"heartbeat/{RANK}"]) and made.standing.stop.pending


STALLS = [  # role, seconds, whose: told to all, ends alone, fails, others are asked to drop
    (Role.MEMBER, 101.0, 0, "all"),
    (Role.MEMBER, 101.0, CLIENT, "all"),
    (Role.REJOINING, 101.0, 0, "waits"),
    (Role.REJOINING, 101.0, CLIENT, "waits"),
    (Role.REJOINING, 161.0, 0, "alone"),
    (Role.OUTLIVED, 101.0, 0, "waits"),
    (Role.OUTLIVED, 101.0, CLIENT, "fails"),
    (Role.OUTLIVED, 161.0, 0, "all"),
]


@pytest.mark.parametrize(("role", "idle_s", "client", "expected"), STALLS)
def test_a_standstill_ends_or_waits_as_the_ranks_role_says(role, idle_s, client, expected):
    made = Parts(role, HashStore())
    made.stalls(idle_s, client)
    made.heartbeats.progress.wait_for(0)
    report = made.look.among_others(made.store)
    assert (report is not None) == (expected in ("all", "alone"))
    assert (Failure.reported(made.store) == report) == (expected in ("all", "waits", "fails"))
    assert made.failed == ([made.heartbeats.stall] if expected == "fails" else [])
    assert made.drops == (["asked"] if expected == "waits" else [])


@pytest.mark.parametrize("awaits", [None, "shared"])
def test_no_client_is_dropped_for_a_rank_that_waits_for_no_other_client(awaits):
    made = Parts(Role.OUTLIVED, HashStore())
    made.stalls(101.0, 0)
    made.heartbeats.progress.wait_for(awaits)
    assert made.look.among_others(made.store) is None and not made.drops


class Going(HashStore):
    """Answers until its host has gone."""

    gone = False
    asked = 0

    def check(self, keys):
        self.asked += 1
        if self.gone:
            raise RuntimeError("Connection reset by peer")
        return super().check(keys)


@pytest.fixture
def watch() -> Iterator:
    made: list[Watcher] = []

    def watch(parts: Parts) -> Watcher:
        made.append(parts.watcher())
        return made[-1]

    yield watch
    for watcher in made:
        watcher.close()


@pytest.mark.parametrize("role", [Role.MEMBER, Role.REJOINING])
def test_a_store_that_is_gone_ends_whoever_nobody_survives(watch, role):
    store = Going()
    made = Parts(role, store)
    watch(made)
    store.gone = True
    wait_until(lambda: made.ending.left, "its end")
    report, mark = made.ending.left[0]
    assert "rank 0" in report.message and "it ended without a report" in report.message
    assert ("before this client was let in" in report.message) == (role is Role.REJOINING)
    assert mark == (role is Role.MEMBER), "the end of a rejoining client is not the job's"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_rejoining_client_tries_again_when_the_store_is_gone(watch):
    store = Going()
    made = Parts(Role.REJOINING, store, return_s=60.0)
    watch(made)
    store.gone = True
    wait_until(lambda: made.ending.came_back, "coming back")
    assert made.ending.came_back == ["has lost the job before it was let in"]
    assert made.ending.begun.locked() and not made.ending.left


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("return_s", [0.0, 60.0])
@pytest.mark.parametrize("told", ["it has finished", ""])
def test_a_rejoining_client_whose_job_has_finished_meanwhile_ends_in_order(watch, return_s, told):
    store = Going()
    made = Parts(Role.REJOINING, store, return_s, over=told)
    watch(made)
    store.gone = True
    wait_until(lambda: made.ending.ended_in_order, "its end")
    assert made.ending.ended_in_order == [told]
    assert made.ending.begun.locked() and not made.ending.left and not made.ending.came_back


def test_survivors_wait_for_another_store_and_watch_that(watch, monkeypatch):
    before, after = Going(), HashStore()
    made = Parts(Role.OUTLIVED, before)
    made.membership.subscribe(watch(made).follow)
    before.gone = True
    asked = before.asked
    wait_until(lambda: before.asked > asked + 1, "another question, in vain")
    assert not made.ending.left

    def move(site: StoreSite, announcement: str, host: int) -> None:
        site.store, site.host = JobStore(after, None, timedelta(seconds=100)), host
        assert announcement == "n1 29500"

    monkeypatch.setattr(StoreSite, "move", move)
    made.membership.change(View(1, (1, 2), 3, "n1 29500"))
    assert made.site.host == 2
    failure = Failure(4, "n2", "", "the value is odd", 2)
    failure.report(after)
    wait_until(lambda: made.ending.left, "the news of the other store")
    assert made.ending.left[0] == (failure, True)


def test_a_view_without_another_store_changes_nothing(watch):
    made = Parts(Role.OUTLIVED, HashStore())
    watcher = watch(made)
    made.membership.subscribe(watcher.follow)
    job = made.site.store
    made.membership.change(View(1, (0, 1), 3))
    assert made.site.store is job


def test_a_watcher_that_fails_ends_its_rank(watch, monkeypatch):
    made = Parts(Role.MEMBER, HashStore())

    def broken(store):
        raise KeyError("a defect")

    monkeypatch.setattr(made.heartbeats, "beat", broken)
    watch(made)
    wait_until(lambda: made.ending.left, "its end")
    report = made.ending.left[0][0]
    assert report.message == "the watcher has failed: KeyError('a defect')"
    assert Failure.reported(made.store) == report


def test_a_watcher_that_is_closed_counts_no_silence_though_its_thread_waits_for_another_one_to_end_the_process():
    class Begun:
        """Held by the main thread, whatever happens."""

        waits = threading.Event()

        def acquire(self, *, timeout: float) -> None:
            self.waits.set()
            threading.Event().wait()

    made = Parts(Role.MEMBER, HashStore())
    made.ending.begun = Begun()
    Failure(1, "n1", "gradient", "the value is odd", 2).report(made.store)
    watcher = made.watcher()
    assert Begun.waits.wait(100)
    watcher.close()
    assert watcher._watch.silence._over.is_set()


def test_a_watcher_that_is_closed_takes_no_end_of_the_store_for_a_failure():
    class Last(HashStore):
        """Whose host goes when all ranks are through."""

        def check(self, keys):
            watcher._finished.set()
            raise RuntimeError("Connection reset by peer")

    made = Parts(Role.MEMBER, Last())
    watcher = made.watcher()
    watcher._watch.thread.join(timeout=100)
    assert not watcher._watch.thread.is_alive() and not made.ending.left

"""All ranks stop after the same inner step, wherever they are when one of them is told to."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import HashStore

from deca_ds.errors import LaunchError
from deca_ds.launch.launcher import Launch
from deca_ds.launch.store import JobStore
from deca_ds.watchdog.guard import JobGuard
from deca_ds.watchdog.stop import StopByStore, request_stop


class Job:
    """Threads that train, one a rank, in lockstep within a client; and one that watches for all of them."""

    def __init__(self, clients: int, ranks: int, pause_s: list[float]):
        self.store, self.steps = HashStore(), 10_000
        self.stops = [StopByStore(rank, clients * ranks, 100.0) for rank in range(clients * ranks)]
        self.ends: list[int | None] = [None] * (clients * ranks)
        self.barriers = [threading.Barrier(ranks) for _ in range(clients)]
        self.threads = [
            threading.Thread(target=self.train, args=(rank, rank // ranks, pause_s[rank // ranks]), daemon=True)
            for rank in range(clients * ranks)
        ]

    def train(self, rank: int, client: int, pause_s: float) -> None:
        done = 0
        while self.stops[rank].may_pass(done):
            self.barriers[client].wait(timeout=100)  # nobody gets through a step without the client's other ranks
            time.sleep(pause_s)
            done += 1
        self.ends[rank] = done

    def run(self, told: list[int], watch_s: float) -> list[int | None]:
        for thread in self.threads:
            thread.start()
        time.sleep(0.02)
        for rank in told:
            self.stops[rank].ask()
        deadline = time.monotonic() + 100
        while any(thread.is_alive() for thread in self.threads) and time.monotonic() < deadline:
            for stop in self.stops:
                stop.look(self.store)
                time.sleep(watch_s)
        return self.ends


@settings(max_examples=15)
@given(
    clients=st.integers(1, 3),
    ranks=st.integers(1, 3),
    told=st.sets(st.integers(0, 8), min_size=1),
    pauses=st.lists(st.sampled_from([0.0005, 0.002, 0.005]), min_size=3, max_size=3),
    watch_s=st.sampled_from([0.0, 0.003]),
)
def test_all_ranks_stop_after_the_same_step_whichever_of_them_is_told(
    clients: int, ranks: int, told: set[int], pauses: list[float], watch_s: float
) -> None:
    world = clients * ranks
    if world == 1:
        return
    ends = Job(clients, ranks, pauses).run(sorted({rank % world for rank in told}), watch_s)
    assert ends[0] is not None and ends == [ends[0]] * world


def test_a_single_process_stops_at_once() -> None:
    stop = StopByStore(0, 1, 1.0)
    assert stop.may_pass(0) and not stop.pending
    stop.ask(15, None)
    assert stop.pending and not stop.may_pass(1)


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize(
    ("who_may", "who_trains", "early"), [("all", [], True), ("others", [], False), ("all", [0], False)]
)
def test_a_rank_ends_early_if_no_rank_trains_yet(ranks, who_may, who_trains, early) -> None:
    store = HashStore()
    stops = [StopByStore(rank, ranks, 100.0) for rank in range(ranks)]
    for stop in stops if who_may == "all" else stops[1:]:
        stop.let_end_early()
    for rank in who_trains:
        assert stops[rank].may_pass(0)
    stops[-1].ask()
    for stop in stops * 4:  # asked, told, agreed, heard
        stop.look(store)
    assert [stop.ends_early for stop in stops] == [early] * ranks
    if not early:
        last = len(who_trains)
        assert [stop.may_pass(last) for stop in stops] == [False] * ranks
        assert ranks == 1 or [stop.may_pass(0) for stop in stops] == [bool(last)] * ranks


def test_a_job_that_is_not_told_continues() -> None:
    store = HashStore()
    stop = StopByStore(0, 2, 1.0)
    for done in range(5):
        assert stop.may_pass(done)
        stop.look(store)
    assert not stop.pending


def test_ranks_that_never_agree_are_told_of() -> None:
    store = HashStore()
    stop = StopByStore(0, 2, 0.0)
    assert stop.may_pass(0)
    stop.ask()
    stop.look(store)
    with pytest.raises(LaunchError, match="did not agree"):
        stop.may_pass(1)


@pytest.mark.parametrize("ranks", [1, 2])
def test_all_ranks_hear_what_is_asked_in_a_folder_that_one_of_them_sees(tmp_path, ranks):
    shared = HashStore()
    guards = [
        JobGuard(Launch("python", rank, ranks, rank, None), JobStore(shared, None, timedelta(seconds=100)))
        for rank in range(ranks)
    ]
    assert all(guard.stop.may_pass(0) for guard in guards)
    guards[-1].write_to(tmp_path)
    request_stop(tmp_path)
    deadline = time.monotonic() + 100
    while not all(guard.stop.pending for guard in guards) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(guard.stop.may_pass(1) for guard in guards)
    with ThreadPoolExecutor(ranks) as threads:
        list(threads.map(JobGuard.finish, guards))

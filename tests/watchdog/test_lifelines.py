"""Who goes without a goodbye takes the other ranks of its client along."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from deca_ds.watchdog.lifelines import Lifeline
from deca_ds.watchdog.stop import StopByCommit


@pytest.fixture
def ranks():
    """Three ranks in one process, and what each is told of the others."""
    timeout = timedelta(seconds=60)
    server = TCPStore("127.0.0.1", 0, is_master=True, timeout=timeout, wait_for_workers=False)
    told: list[list[str]] = [[], [], []]
    made: list[Lifeline | None] = [None, None, None]

    def start(shard: int) -> None:
        store = server if shard == 0 else TCPStore(
            "127.0.0.1", server.port, is_master=False, timeout=timeout, wait_for_workers=False
        )  # fmt: skip
        made[shard] = Lifeline(store, shard, 3, 60, lambda error: told[shard].append(str(error)))

    threads = [threading.Thread(target=start, args=(shard,)) for shard in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=100)
    return made, told


def until(condition: Callable[[], object], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(condition())


def test_a_death_is_told_to_the_leader_and_the_leader_s_to_all(ranks):
    made, told = ranks
    for connection in made[2]._peers:
        connection.shutdown(2)  # as the system does for a process that is gone
    assert until(lambda: told[0]) and "rank 2 of this client is gone" in told[0][0]
    for connection in made[0]._peers:
        connection.shutdown(2)
    assert until(lambda: told[1]) and "rank 0 of this client is gone" in told[1][0]


def test_goodbyes_in_any_order_are_no_deaths(ranks):
    made, told = ranks
    for lifeline in (made[1], made[0], made[2]):
        lifeline.close()
    for connection in made[1]._peers:
        connection.shutdown(2)
    assert not until(lambda: any(told), 0.3)


def test_a_stop_that_one_rank_was_asked_for_holds_for_all():
    asked, other = StopByCommit(), StopByCommit()
    assert asked.may_pass(3) and asked.answer() and not asked.pending
    asked.ask(15, None)
    assert asked.pending and asked.may_pass(3), "it stops where all have agreed to"
    answers = all([asked.answer(), other.answer()])
    for stop in (asked, other):
        stop.heard(answers)
        assert not stop.may_pass(4)

"""Faults of the membership protocol and of its surroundings, each as a short schedule on a simulated job.

Most were found by fault campaigns on real jobs (benchmarks/survivors.py), the others by driving the protocol at random
(test_protocol.py). Every check of simulated_job.py is on in all of them.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
from simulated_job import Job, Process

from deca_ds.elastic.decision import OPEN, YES, Decision
from deca_ds.elastic.protocol import Coordinator, Message, Sends
from deca_ds.launch.launcher import ClientLayout


def in_training(clients: int, ranks: int = 1, **options) -> Job:
    job = Job(clients, ranks, **options)
    assert job.until(lambda: all(process.step >= 2 for process in job.processes))
    return job


def ends_well(job: Job, clients: set[int], *, one_part: bool = True) -> None:
    """A few steps more, and nothing is broken; these clients have trained to the end, and nobody else has."""
    job.steps = max(process.step for process in job.processes if process.alive) + 3
    job.checks.comes_to_an_end()
    assert {process.client for process in job.processes if process.through} == clients
    if one_part:
        job.checks.is_one_part()


def decided(job: Job, rank: int) -> int:
    return job.current[rank].log[-1].number


def tell_only(job: Job, told: int) -> None:
    """Until the active coordinator has made a decision and only `told` knows it; the others' is under way."""
    before = decided(job, told)

    def others(to: Process, message: Message) -> bool:
        return message["kind"] == "decision" and message["number"] > before and to.rank != told

    assert job.until(lambda: decided(job, told) > before, hold=others)


def come_back(job: Job, client: int) -> None:
    job.start(client)
    assert job.until(lambda: all(process.log for process in job.ranks(client)))


def test_a_client_that_dies_takes_its_ranks_along_and_the_others_continue():
    job = in_training(3, ranks=2)
    job.kill(job.current[3])
    job.run(10)
    assert job.current[0].log[-1].clients == (0, 2)
    ends_well(job, {0, 2})


def test_coordinators_are_lost_one_after_the_other():
    job = in_training(4, ranks=2)
    for client in (0, 1, 2):
        job.kill(job.ranks(client)[1])
        job.run(5)
    ends_well(job, {3})


@pytest.mark.parametrize("told", [1, 2], ids=["the next coordinator's", "another one's"])
def test_a_decision_that_only_one_has_heard_counts_for_all(told):
    """The other one is slow, so that the vote which it has given before must not stand for the next one."""
    job = in_training(3)
    tell_only(job, told)
    slow = job.current[3 - told]
    slow.hangs = True
    job.kill(job.current[0], lose=True)
    job.notice(job.current[told], 3.0)
    job.run(10)
    slow.hangs = False
    assert slow.log[-1].number >= job.current[told].log[-2].number
    ends_well(job, {1, 2})


def test_a_client_dropped_by_a_decision_that_the_next_coordinator_has_not_heard_stays_out():
    """Client 3 has lost the coordinator, without knowing why, and only client 2 has heard that it is out."""
    job = in_training(4)
    job.clean = False
    job.cut(job.current[3].connection, lose=True)
    job.notice(job.current[3], 8.0)
    job.step(hold=lambda to, _: to is not job.current[0])
    before = decided(job, 2)

    def hold(to: Process, message: Message) -> bool:
        return message["kind"] == "decision" and message["number"] > before and to.rank in (0, 1)

    assert job.until(lambda: decided(job, 2) > before and job.current[2].log[-1].clients == (0, 1, 2), hold=hold)
    job.kill(job.current[0], lose=True)
    job.run(15)
    assert job.current[3].voter.out is not None
    ends_well(job, {1, 2})


def test_a_client_that_is_given_a_decision_after_a_loss_waits_for_nobody_lost():
    """Client 3 notices the loss late, when all others have given up their messages already."""
    job = in_training(4)
    tell_only(job, 2)
    job.kill(job.current[0], lose=True)
    job.notice(job.current[3], 8.0)
    job.run(22)  # less than the time after which somebody is taken for hanging
    assert job.current[3].log[-1].clients == (1, 2, 3)
    ends_well(job, {1, 2, 3})


def test_a_client_that_does_not_come_to_the_next_coordinator_is_out():
    job = in_training(3)
    job.freeze(job.ranks(2), 60.0)
    job.kill(job.current[0])
    job.run(25)
    assert job.current[1].log[-1].clients == (1,)


def test_a_client_that_is_cut_off_from_a_living_coordinator_leaves():
    job = in_training(3)
    job.clean = False
    job.cut(job.current[2].connection, lose=True)
    job.run(45)
    assert "cut off" in str(job.current[2].voter.out)
    ends_well(job, {0, 1})


def test_a_next_coordinator_that_hangs_is_lost_and_nobody_is_taken_for_cut_off():
    """Client 1 hangs before it has noticed that the coordinator is lost, with client 2 waiting at it."""
    job = in_training(3)
    job.kill(job.current[0], lose=True)
    job.notice(job.current[1], 11.0)
    job.run(3)
    job.freeze(job.ranks(1), 200.0)
    job.run(60)
    assert job.current[2].voter.out is None and job.current[2].log[-1].clients == (2,)


def test_a_next_coordinator_that_was_stopped_for_a_while_is_waited_for():
    """Client 1 is stopped before it has noticed the loss, and its first sign of life afterwards comes before that."""
    job = in_training(3, silence_s=100.0)
    job.kill(job.current[0], lose=True)
    job.notice(job.current[1], 11.0)
    job.run(3)
    job.freeze(job.ranks(1), 60.0)
    job.run(80)
    ends_well(job, {1, 2})


def test_a_next_coordinator_that_is_stopped_between_two_hellos_of_a_client_is_lost_to_both_ranks_alike():
    """One rank of client 2 is welcome and the other one is not, and their client must not fall apart over it."""
    job = in_training(3, ranks=2, silence_s=100.0)
    job.kill(job.current[0], lose=True)

    def late(to: Process, message: Message) -> bool:
        return message["kind"] == "hello" and message["rank"] == 5

    welcome = job.sent["welcome"]
    assert job.until(lambda: job.sent["welcome"] >= welcome + 3, hold=late)
    job.freeze(job.ranks(1), 200.0)
    job.run(120)
    assert {process.voter.out for process in job.ranks(2)} == {None}
    assert job.current[4].log[-1].clients == (2,)
    ends_well(job, {2})


@pytest.mark.parametrize("hanging", [1, 0], ids=["another client", "the coordinator's own client"])
@pytest.mark.parametrize("whole", [False, True], ids=["a main thread", "processes"])
def test_a_client_that_hangs_is_dropped(hanging, whole):
    job = in_training(3, ranks=2)
    hangs = job.ranks(hanging)
    if whole:
        job.freeze(hangs, 80.0)
    else:
        job.hang(hangs[1])
    job.run(60)
    others = tuple(client for client in range(3) if client != hanging)
    assert job.current[4].log[-1].clients == others
    job.run(30)
    assert not any(process.alive for process in hangs)
    ends_well(job, set(others))


@pytest.mark.parametrize(("every_s", "remain"), [(1.0, [0]), (8.0, [0]), (12.0, [0, 1])])
def test_a_rank_that_is_slow_to_repeat_that_nobody_moves_on_is_heard(every_s, remain):
    """The watcher of a busy rank may be late; 12 s later it is another standstill."""
    coordinator = Coordinator(ClientLayout(2, 1), 0, (0, 1), 60.0, 60.0, 0.0)

    def hear(connection: int, kind: str, now: float, **content: Any) -> None:
        coordinator.heard(connection, {"kind": kind, "rank": connection, **content}, now)
        coordinator.passed(now)

    for rank in (0, 1):
        hear(rank, "hello", 0.0, last=asdict(Decision(0, 0, "", (0, 1))), lost=[])
    hear(0, "vote", 1.0, number=1, yes=YES, announcement="")
    for again in range(8):
        hear(0, "stalled", 60.0 + every_s * again, number=1)
    assert coordinator.clients == remain


@pytest.mark.parametrize("late_s", [2.0, 4.0, 6.0, 8.0, 11.0])
def test_a_client_that_comes_late_during_a_stall_is_waited_for(late_s):
    """The coordinator's own client hangs, and its host is lost just before it would have stopped coordinating."""
    job = in_training(3)
    job.hang(job.current[0])
    stalled = job.sent["stalled"]
    assert job.until(lambda: job.sent["stalled"] > stalled)
    job.kill(job.current[0], lose=True)
    job.notice(job.current[2], late_s)
    job.run(25)
    assert job.current[2].voter.out is None
    ends_well(job, {1, 2})


def test_a_client_that_comes_during_a_stall_has_time_to_vote():
    job = in_training(3)
    job.hang(job.current[0])
    job.current[2].hangs = True
    stalled = job.sent["stalled"]
    assert job.until(lambda: job.sent["stalled"] > stalled)
    job.kill(job.current[0], lose=True)
    job.notice(job.current[2], 4.0)
    job.run(7)
    job.current[2].hangs = False
    job.run(1)
    assert job.current[2].voter.out is None
    ends_well(job, {1, 2})


def test_a_client_that_continues_after_all_is_not_dropped():
    job = in_training(3)
    job.freeze(job.ranks(2), 32.0)  # the others are about to take it for hanging
    job.run(40)
    assert decided(job, 2) == decided(job, 0)
    ends_well(job, {0, 1, 2})


def test_coordinators_that_were_stopped_are_lost_and_learn_it_later():
    job = in_training(4)
    for client in (0, 1):
        job.freeze(job.ranks(client), 150.0)
    job.run(100)
    assert job.current[3].log[-1].clients == (2, 3)
    job.run(60)
    assert job.current[0].voter.out and job.current[1].voter.out
    ends_well(job, {2, 3})


def test_a_client_comes_back_last_in_the_line_and_is_coordinator_in_the_end():
    job = in_training(3, ranks=2)
    job.kill(job.current[0])
    job.run(5)
    come_back(job, 0)
    job.run(10)
    assert job.current[2].log[-1].clients == (1, 2, 0)
    for client in (1, 2):
        job.kill(job.ranks(client)[0])
        job.run(5)
    assert job.current[0].log[-1].clients == (0,)
    ends_well(job, {0})


def test_a_client_that_was_absent_at_the_start_comes_later():
    job = in_training(3, present=(1, 2))
    come_back(job, 0)
    ends_well(job, {0, 1, 2})


def test_nobody_comes_in_unless_all_are_open_to_it():
    """Client 1 meets those that are left after a loss, while another one is ready to come in."""
    job = in_training(4)
    job.kill(job.current[3])
    job.run(5)
    job.start(3)
    assert job.until(lambda: job.current[3].waits == ("admission",))
    job.kill(job.current[2])
    job.run(15)
    (joined,) = (each for each in job.current[0].log if each.joining)
    assert joined.clients == (0, 1)
    ends_well(job, {0, 1, 3})


def test_nobody_comes_in_with_a_decision_that_another_one_is_lost_by():
    """The others have to meet anew first, so that they could hand nothing over; the vote of all was open to it."""
    job = in_training(4)
    job.kill(job.current[3])
    job.run(5)
    assert job.until(lambda: job.current[2].waits[0] == "meet" and job.current[2].waits[1][2][0] == "step")
    job.hang(job.current[2])
    job.start(3)
    job.run(5)
    assert all(job.current[rank].waits[:2] == ("vote", YES | OPEN) for rank in (0, 1))
    number = decided(job, 0) + 1
    job.kill(job.current[2])
    job.run(10)
    (lost,) = (each for each in job.current[0].log if each.number == number)
    assert (lost.clients, lost.yes, lost.joining) == ((0, 1), YES | OPEN, ())
    ends_well(job, {0, 1, 3})


def test_a_guest_that_waits_learns_of_the_guests_that_came_before():
    job = in_training(4)
    for client in (1, 3):
        job.kill(job.current[client])
    job.run(5)
    for client in (1, 3):
        job.start(client)
    job.run(20)
    assert job.current[1].voter.addresses == job.current[3].voter.addresses == job.current[0].voter.addresses
    ends_well(job, {0, 1, 2, 3})


def test_a_guest_that_asks_just_after_another_has_come_in_is_told_its_address():
    """The leader has not heard yet of the decision by which client 0, absent at the start, has come in."""
    job = in_training(4, present=(1, 2, 3))
    job.kill(job.current[3])
    job.run(5)
    job.start(0)
    coordinator = job.current[1].coordinator

    def hold(to: Process, message: Message) -> bool:
        return to is job.current[1] and message["kind"] == "decision" and bool(message["joining"])

    assert job.until(lambda: bool(coordinator.last.joining), hold)
    job.start(3)
    assert job.until(lambda: job.current[3].voter is not None, hold)
    job.run(10)
    assert job.current[3].voter.addresses[0] == job.address(0)
    ends_well(job, {0, 1, 2, 3})


def test_a_guest_that_waits_asks_again_when_the_store_has_moved():
    """Client 1 hosts the store; the new host has invited nobody yet when it is lost."""
    job = in_training(4)
    job.kill(job.current[0])
    job.run(5)
    job.kill(job.current[3])
    job.run(5)
    job.start(3)
    assert job.until(lambda: job.current[3].waits == ("admission",))
    leader = job.current[1]
    leader.coordinator.invitation = leader.coordinator.invitation | {"store": ("store", 99)}
    job.run(10)
    assert "moved to another store" in str(job.current[3].voter.out)
    ends_well(job, {1, 2})


def test_all_ranks_of_a_guest_are_invited_to_one_store_whenever_the_first_asked():
    """The job moves to another store between the two ranks of client 1."""
    coordinator = Coordinator(ClientLayout(2, 2), 0, (0,), 60.0, 60.0, 0.0)

    def hear(rank: int, kind: str, **content: Any) -> Sends:
        return coordinator.heard(rank, {"kind": kind, "rank": rank, **content}, 0.0)

    for rank in (0, 1):
        hear(rank, "hello", last=asdict(Decision(0, 0, "", (0,))), lost=[])
    for rank, port in ((2, 1), (3, 2)):
        coordinator.invite({"store": ("store", port), "addresses": []})
        invited = hear(rank, "join", address=("host", 9) if rank == 2 else None)
    assert {(to, message["kind"], message["store"]) for to, message in invited} == {
        (2, "invitation", ("store", 2)),
        (3, "invitation", ("store", 2)),
    }
    for rank in (2, 3):
        hear(rank, "ready")
    for rank in (0, 1):
        hear(rank, "vote", number=1, yes=YES | OPEN, announcement="")
    assert coordinator.last.joining == ((1, "host", 9),)


def test_a_guest_that_goes_is_forgotten():
    job = in_training(3, ranks=2)
    job.kill(job.current[4])
    job.run(5)
    job.start(2)
    assert job.until(lambda: job.current[4].waits == ("admission",))
    job.kill(job.current[5])
    job.run(20)
    assert job.current[0].log[-1].everybody == (0, 1)
    come_back(job, 2)
    ends_well(job, {0, 1, 2})


def test_a_client_that_is_still_in_cannot_join():
    job = in_training(3)
    job.start(1)
    job.run(5)
    assert job.current[1].voter is None and not job.current[1].asking
    assert job.processes[0].log[-1].clients == (0, 1, 2)


def test_the_coordinator_is_lost_before_a_guest_came_in():
    job = in_training(3)
    job.kill(job.current[2])
    job.run(5)
    job.start(2)
    assert job.until(lambda: job.current[2].waits == ("admission",))
    job.kill(job.current[0])
    job.run(5)
    assert "before this client was let in" in str(job.current[2].voter.out)
    come_back(job, 2)
    ends_well(job, {1, 2})


def test_the_late_goodbye_of_a_dropped_client_does_not_count():
    """A process that was stopped says goodbye when it runs again; its client has come back meanwhile."""
    job = in_training(3)
    old = job.current[1]
    job.freeze([old], 500.0)
    job.run(60)
    come_back(job, 1)
    old.connection.up.append((job.now, {"kind": "goodbye"}))
    job.run(10)
    ends_well(job, {0, 1, 2})


def test_the_goodbye_of_a_rank_whose_client_was_dropped_is_forgotten():
    job = in_training(3, ranks=2)
    job.says(job.current[2], job.current[2].voter.goodbye())
    job.run(0)
    job.kill(job.current[3])
    job.run(5)
    come_back(job, 1)
    job.run(10)
    ends_well(job, {0, 1, 2})


def test_processes_that_were_dropped_do_not_take_the_place_of_new_ones():
    """They run again when another coordinator is active, which has never heard that they were out."""
    job = in_training(3)
    old = job.current[2]
    job.freeze([old], 120.0)
    job.run(60)
    come_back(job, 2)
    job.run(5)
    job.kill(job.current[0], lose=True)
    job.run(80)
    assert "continued without it" in str(old.voter.out)
    ends_well(job, {1, 2})


def test_goodbyes_put_nobody_out():
    job = in_training(3, ranks=2)
    ends_well(job, {0, 1, 2})
    assert {process.log[-1].clients for process in job.processes} == {(0, 1, 2)}


def test_a_client_that_leaves_is_out_and_the_coordinator_may_leave():
    job = in_training(4)
    for client in (2, 0):
        leaves = job.current[client]
        job.says(leaves, leaves.voter.leave("it reaches nobody"))
        job.run(1)
        job.kill(leaves)
        job.run(5)
    assert job.current[1].log[-1].clients == (1, 3)
    ends_well(job, {1, 3})


def test_messages_fail_though_everybody_is_there():
    job = in_training(3)
    job.current[1].damaged = True
    job.run(10)
    assert any(not each.yes & 1 for each in job.current[0].log)
    ends_well(job, {0, 1, 2})


def test_the_parts_of_a_network_continue_each_by_itself():
    job = in_training(5)
    job.clean = False
    job.set_apart({0, 1}, {2, 3, 4}, True)
    job.run(60)
    assert [job.current[client].log[-1].clients for client in (1, 4)] == [(0, 1), (2, 3, 4)]
    ends_well(job, {0, 1, 2, 3, 4}, one_part=False)


def test_the_coordinator_is_lost_while_all_say_hello_to_the_next_one():
    job = in_training(5)
    job.kill(job.current[0])
    job.catch("hello", 5.0)
    job.kill(job.current[1], lose=True)
    job.catch("hello", 5.0)
    job.kill(job.current[2], lose=True)
    job.run(5)
    assert job.current[3].log[-1].clients == (3, 4)
    ends_well(job, {3, 4})


def test_a_graceful_end_of_the_coordinator_is_no_loss_of_work():
    """The others are not through yet when the store's host has seen them vote for the last time."""
    job = in_training(3, ranks=2, seed=5)
    job.steps = job.current[0].step + 1
    assert job.until(lambda: any(process.through for process in job.processes))
    job.checks.comes_to_an_end()
    assert {process.step for process in job.processes} == {job.steps}

"""A model check of the membership protocol: random faults on simulated jobs, and proof that the checks find mistakes.

`make test` runs some of them, always the same. A long campaign, with other faults each time:

    DECA_TEST_JOBS=20000 .venv/bin/python -m pytest tests/elastic/test_protocol.py -k random --timeout 0
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import test_scenarios as scenarios
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from simulated_job import Job, Process

from deca_ds.elastic import voter
from deca_ds.elastic.agreement import OPEN
from deca_ds.elastic.protocol import Coordinator
from deca_ds.elastic.voter import Voter

JOBS = int(os.environ.get("DECA_TEST_JOBS", 0))
KINDS = ["decision", "hello", "vote", "welcome", "interrupt", "out", "join", "ready", "addresses", "stalled", "goodbye"]
kinds = st.sampled_from(KINDS)
FEW, NUMBERS, MOMENTS = [1, 2, 3, 4, 0, 8, 12], range(12), [0.0, 0.0, 3.0, 11.0]
few, numbers, moments = st.sampled_from(FEW), st.sampled_from(NUMBERS), st.sampled_from(MOMENTS)


class Faults(RuleBasedStateMachine):
    """A job of 2 to 5 clients with 1 to 3 ranks each, struck by one fault after the other.

    Between the rules things happen in the order that the job's own generator chooses. After the last rule the network
    is whole, and all that is left has to come to an end.
    """

    job: Job

    @initialize(
        clients=st.sampled_from([3, 4, 5, 3, 4, 2]),
        ranks=st.sampled_from([1, 1, 1, 2, 3]),
        seed=st.integers(0, 2**32),
        silence_s=st.sampled_from([30.0, 30.0, 100.0]),
        first_is_absent=st.booleans(),
    )
    def begin(self, clients: int, ranks: int, seed: int, silence_s: float, first_is_absent: bool) -> None:
        present = tuple(range(1, clients)) if first_is_absent and clients > 2 else ()
        self.job = Job(clients, ranks, seed, present=present, silence_s=silence_s)

    def _processes(self) -> list[Process]:
        return [process for process in self.job.processes if process.runs and not process.through]

    def _victim(self, number: int) -> Process | None:
        """The coordinator at work for numbers below 6, else any; None where nobody would be left."""
        running = self._processes()
        if len({process.client for process in running}) < 2:
            return None
        at_work = [process for process in running if process.coordinator and process.coordinator.clients]
        return at_work[number % len(at_work)] if at_work and number < 6 else running[number % len(running)]

    @rule(seconds=st.sampled_from([1.0, 3.0, 12.0, 45.0]))
    def time_passes(self, seconds: float) -> None:
        self.job.run(seconds)

    @rule(kind=kinds, steps=few)
    def in_the_midst(self, kind: str, steps: int) -> None:
        """Of an agreement, of a move to the next coordinator, of somebody coming in."""
        self.job.catch(kind, 12.0)
        for _ in range(steps):
            self.job.step()

    @rule(kind=st.sampled_from(["decision", "decision", "hello"]), steps=few, number=numbers, after_s=moments)
    def the_coordinator_dies(self, kind: str, steps: int, number: int, after_s: float) -> None:
        """It has told a few, and what is under way is lost. after_s: one of the others notices so much later."""
        self.in_the_midst(kind, steps)
        if victim := self._victim(0):
            others = [each.rank for each in victim.connections.values() if each.rank.runs and each.rank is not victim]
            self.job.kill(victim, lose=True)
            if others:
                late = others[number % len(others)]
                if late.connection is not None and late.connection.coordinator is victim:
                    self.job.notice(late, after_s)

    @rule(number=numbers, kind=kinds, steps=few, lose=st.booleans())
    def a_rank_dies(self, number: int, kind: str, steps: int, lose: bool) -> None:
        """lose: what it has sent."""
        self.in_the_midst(kind, steps)
        if victim := self._victim(number):
            self.job.kill(victim, lose)

    @rule(number=numbers, long=st.booleans())
    def a_client_is_stopped(self, number: int, long: bool) -> None:
        if victim := self._victim(number):
            self.job.freeze(self.job.ranks(victim.client), self.job.silence_s + 20.0 if long else 8.0)

    @rule(number=numbers)
    def a_main_thread_hangs(self, number: int) -> None:
        if victim := self._victim(number):
            self.job.hang(victim)

    @rule(number=numbers)
    def a_client_leaves(self, number: int) -> None:
        victim = self._victim(number)
        if victim and victim.log and victim.waits is not None:
            self.job.says(victim, victim.voter.leave("it reaches nobody"))
            self.job.kill(victim)

    @rule(seconds=st.sampled_from([15.0, 0.0]))
    def clients_come_back(self, seconds: float) -> None:
        for client in range(self.job.layout.clients):
            if self.job.may_start(client):
                self.job.start(client)
        self.job.run(seconds)

    @rule(seed=st.integers(0, 2**32))
    def faults_on_top_of_each_other(self, seed: int) -> None:
        """Those after which everybody who lives and runs has to go on together."""
        draw = random.Random(seed)
        for _ in range(4):
            kind, steps, number, after_s = map(draw.choice, (KINDS, FEW, NUMBERS, MOMENTS))
            draw.choice(
                [
                    partial(self.the_coordinator_dies, draw.choice(["decision", "hello"]), steps, number, after_s),
                    partial(self.a_rank_dies, number, kind, steps, draw.random() < 0.5),
                    partial(self.a_client_is_stopped, number, draw.random() < 0.5),
                    partial(self.a_main_thread_hangs, number),
                    partial(self.clients_come_back, 15.0),
                    partial(self.clients_come_back, after_s),
                    partial(self.in_the_midst, kind, steps),
                ]
            )()

    @rule(number=numbers, steps=few, lose=st.booleans(), after_s=moments)
    def a_connection_breaks(self, number: int, steps: int, lose: bool, after_s: float) -> None:
        self.in_the_midst("vote", steps)
        between = [each for each in self.job.connections if each.rank.client != each.coordinator.client]
        if between:
            self.job.clean = False
            self.job.cut(between[number % len(between)], lose, after_s)

    @rule(part=st.sets(st.integers(0, 4)))
    def the_network_falls_apart(self, part: set[int]) -> None:
        self.job.clean = False
        self.job.set_apart(part, set(range(self.job.layout.clients)) - part, True)

    @precondition(lambda self: self.job.blocked)
    @rule()
    def the_network_is_whole_again(self) -> None:
        self.job.blocked = set()

    @rule(number=numbers, seconds=st.sampled_from([0.0, 1.0, 5.0]))
    def messages_are_late(self, number: int, seconds: float) -> None:
        if self.job.connections:
            self.job.connections[number % len(self.job.connections)].late_s = seconds

    @rule(number=numbers)
    def a_message_is_damaged(self, number: int) -> None:
        if running := self._processes():
            running[number % len(running)].damaged = True

    @precondition(lambda self: self.job.steps > 1000)
    @rule(number=numbers)
    def training_ends_soon(self, number: int) -> None:
        if number == 0:
            self.job.steps = max(process.step for process in self.job.processes) + 2

    def teardown(self) -> None:
        if not hasattr(self, "job"):
            return
        job = self.job
        job.blocked = set()
        for connection in job.connections:
            connection.late_s = 0.0
        while any(process.frozen and process.alive for process in job.processes):
            job.tick()
        job.run(2)
        if job.steps > 1000:
            job.steps = max(process.step for process in job.processes) + 3
        job.checks.comes_to_an_end()
        if job.clean:
            job.checks.is_one_part()


def test_random_faults() -> None:
    """Without shrinking in `make test`, where a failure is for a campaign to look at."""
    options = {"max_examples": JOBS or 600, "stateful_step_count": 25 if JOBS else 15, "derandomize": not JOBS}
    phases = [Phase.generate, Phase.shrink] if JOBS else [Phase.generate]
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    run_state_machine_as_test(
        Faults, settings=settings(**options, phases=phases, database=None, deadline=None, suppress_health_check=checks)
    )


# Mistakes in the protocol, each with a schedule that shows it.

real = {name: vars(Coordinator)[name] for name in vars(Coordinator) if callable(vars(Coordinator)[name])}


def decides_without_one_vote(patch) -> None:
    patch.setattr(Coordinator, "_voters", lambda self: real["_voters"](self)[:-1])


def keeps_a_missed_decision(patch) -> None:
    def hello(self, peer, last, lost, now):
        for each in (peer, *self._lines.values()):
            each.known = max(each.known, last.number, self.last.number)
        real["_hello"](self, peer, last, lost, now)

    patch.setattr(Coordinator, "_hello", hello)


def keeps_votes_of_an_older_number(patch) -> None:
    def settle(self, decision):
        votes = {} if decision.clients == tuple(self.clients) and self._decides else dict(self._votes)
        real["_settle"](self, decision)
        self._votes.update(votes)

    def decide(self):
        self._decides = True
        real["_decide"](self)
        self._decides = False

    patch.setattr(Coordinator, "_decides", False, raising=False)
    patch.setattr(Coordinator, "_settle", settle)
    patch.setattr(Coordinator, "_decide", decide)


def takes_its_own_old_list_of_clients(patch) -> None:
    def hello(self, peer, last, lost, now):
        at_work = self._at_work
        real["_hello"](self, peer, last, lost, now)
        if not at_work and self._at_work:
            self._began_with = self.last

    def clients(self):
        everybody = (self._began_with or self.last).everybody
        return [client for client in everybody if client not in self._gone] if self._at_work else []

    def settle(self, decision):
        if decision.clients == tuple(self.clients):
            self._began_with = None
        real["_settle"](self, decision)

    patch.setattr(Coordinator, "_began_with", None, raising=False)
    patch.setattr(Coordinator, "_hello", hello)
    patch.setattr(Coordinator, "_settle", settle)
    patch.setattr(Coordinator, "clients", property(clients))


def lets_in_who_is_not_let_in(patch) -> None:
    patch.setattr(Coordinator, "_announced", lambda self, yes: real["_announced"](self, yes | OPEN))


def lets_in_amid_a_loss(patch) -> None:
    def announced(self, yes):
        self._gone, gone = set(), self._gone
        joining = real["_announced"](self, yes)
        self._gone = gone
        return joining

    patch.setattr(Coordinator, "_announced", announced)


def interrupts_nobody_after_a_missed_decision(patch) -> None:
    patch.setattr(Coordinator, "_will_not_count", False)


def interrupts_nobody(patch) -> None:
    patch.setattr(Coordinator, "_will_not_count", False)
    patch.setattr(Coordinator, "_interrupt", lambda self: None)


def hears_processes_that_were_put_out(patch) -> None:
    def hello(self, peer, last, lost, now):
        if last.number < self.last.number - 1:
            last = replace(last, number=self.last.number - 1)
            peer.known = last.number
        real["_hello"](self, peer, last, lost, now)

    patch.setattr(Coordinator, "_hello", hello)


def is_silent_until_it_is_at_work(patch) -> None:
    def awake(self, now):
        sends = real["awake"](self, now)
        return sends if self._at_work else []

    patch.setattr(Coordinator, "awake", awake)


def takes_silence_for_being_cut_off(patch) -> None:
    patch.setattr(voter, "_SILENT_S", math.inf)


def remembers_goodbyes(patch) -> None:
    def put_out(self, client, why):
        done = set(self._done)
        real["_put_out"](self, client, why)
        self._done |= done

    patch.setattr(Coordinator, "_put_out", put_out)


def hears_goodbyes_of_who_is_out(patch) -> None:
    def heard(self, connection, message, now):
        if message["kind"] == "goodbye" and connection in self._peers:
            self._done.add(self._peers[connection].rank)
        real["_heard"](self, connection, message, now)

    patch.setattr(Coordinator, "_heard", heard)


def goes_on_after_it_was_stopped(patch) -> None:
    def awake(self, now):
        self._signed = max(self._signed, now - self._silence_s)
        return real["awake"](self, now)

    patch.setattr(Coordinator, "awake", awake)


def waits_for_those_who_hang(patch) -> None:
    patch.setattr(Coordinator, "_put_out_who_hangs", lambda self: None)


def does_not_vote_again(patch) -> None:
    heard = Voter.heard

    def forgets(self, message, now):
        if message["kind"] == "welcome":
            self._ballot = None
        return heard(self, message, now)

    patch.setattr(Voter, "heard", forgets)


@pytest.mark.parametrize(
    ("mistake", "schedule"),
    [
        (decides_without_one_vote, scenarios.test_goodbyes_put_nobody_out),
        (keeps_a_missed_decision, lambda: scenarios.test_a_decision_that_only_one_has_heard_counts_for_all(2)),
        (keeps_votes_of_an_older_number, lambda: scenarios.test_a_decision_that_only_one_has_heard_counts_for_all(2)),
        (
            takes_its_own_old_list_of_clients,
            scenarios.test_who_was_put_out_by_a_decision_that_the_next_coordinator_has_not_heard_stays_out,
        ),
        (lets_in_who_is_not_let_in, scenarios.test_nobody_comes_in_unless_all_are_open_to_it),
        (lets_in_amid_a_loss, scenarios.test_nobody_comes_in_with_a_decision_that_another_one_is_lost_by),
        (
            interrupts_nobody_after_a_missed_decision,
            scenarios.test_who_is_given_a_decision_after_a_loss_waits_for_nobody_lost,
        ),
        (interrupts_nobody, scenarios.test_a_client_that_dies_takes_its_ranks_along_and_the_others_go_on),
        (
            hears_processes_that_were_put_out,
            scenarios.test_processes_that_were_put_out_do_not_take_the_place_of_new_ones,
        ),
        (is_silent_until_it_is_at_work, scenarios.test_who_is_cut_off_from_a_living_coordinator_leaves),
        (
            takes_silence_for_being_cut_off,
            scenarios.test_a_next_coordinator_that_hangs_is_lost_and_nobody_is_taken_for_cut_off,
        ),
        (remembers_goodbyes, scenarios.test_the_goodbye_of_a_rank_whose_client_was_put_out_is_forgotten),
        (hears_goodbyes_of_who_is_out, scenarios.test_the_late_goodbye_of_who_was_put_out_does_not_count),
        (goes_on_after_it_was_stopped, scenarios.test_coordinators_that_were_stopped_are_lost_and_learn_it_later),
        (waits_for_those_who_hang, lambda: scenarios.test_who_hangs_is_put_out(1, True)),
        (does_not_vote_again, scenarios.test_coordinators_are_lost_one_after_the_other),
    ],
    ids=lambda each: each.__name__ if each.__name__ in globals() else "",
)
def test_mistakes_are_found(mistake: Callable, schedule: Callable, monkeypatch) -> None:
    mistake(monkeypatch)
    with pytest.raises(AssertionError):  # Violation is one
        schedule()

"""A model check of the membership protocol: random faults on simulated jobs.

`make test` runs some of them, always the same. A long campaign, with other faults each time:

    DECA_TEST_JOBS=20000 .venv/bin/python -m pytest tests/elastic/test_protocol.py -k random --timeout 0
"""

from __future__ import annotations

import os
import random
from functools import partial

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from simulated_job import Job, Process

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
        """The active coordinator for numbers below 6, else any; None where nobody would be left."""
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
        """Those after which everybody who lives and runs has to continue together."""
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


def test_the_protocol_keeps_its_promises_under_random_faults() -> None:
    """Without shrinking in `make test`, where a failure is for a campaign to look at."""
    options = {"max_examples": JOBS or 600, "stateful_step_count": 25 if JOBS else 15, "derandomize": not JOBS}
    phases = [Phase.generate, Phase.shrink] if JOBS else [Phase.generate]
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    run_state_machine_as_test(
        Faults, settings=settings(**options, phases=phases, database=None, deadline=None, suppress_health_check=checks)
    )

"""Proof that the checks on simulated jobs can fail: mistakes in the protocol, each with a schedule that shows it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import test_scenarios as scenarios

from deca_ds.elastic import voter
from deca_ds.elastic.decision import OPEN
from deca_ds.elastic.protocol import GRACE_S, Coordinator
from deca_ds.elastic.voter import Voter

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
        active = self._active
        real["_hello"](self, peer, last, lost, now)
        if not active and self._active:
            self._began_with = self.last

    def clients(self):
        everybody = (self._began_with or self.last).everybody
        return [client for client in everybody if client not in self._gone] if self._active else []

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


def lets_in_during_a_loss(patch) -> None:
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


def hears_processes_that_were_dropped(patch) -> None:
    def hello(self, peer, last, lost, now):
        if last.number < self.last.number - 1:
            last = replace(last, number=self.last.number - 1)
            peer.known = last.number
        real["_hello"](self, peer, last, lost, now)

    patch.setattr(Coordinator, "_hello", hello)


def is_silent_until_it_is_active(patch) -> None:
    def awake(self, now):
        sends = real["awake"](self, now)
        return sends if self._active else []

    patch.setattr(Coordinator, "awake", awake)


def takes_silence_for_being_cut_off(patch) -> None:
    patch.setattr(voter, "_SILENT_S", math.inf)


def waits_for_a_welcome_less_than_for_other_messages(patch) -> None:
    of_voter = Voter.connected

    def connected(self, now):
        said = of_voter(self, now)
        self.deadline = min(self.deadline, now + 2 * GRACE_S)
        return said

    patch.setattr(Voter, "connected", connected)


def remembers_goodbyes(patch) -> None:
    def drop(self, client, why):
        done = set(self._done)
        real["_drop"](self, client, why)
        self._done |= done

    patch.setattr(Coordinator, "_drop", drop)


def hears_goodbyes_of_who_is_out(patch) -> None:
    def heard(self, connection, message, now):
        if message["kind"] == "goodbye" and connection in self._peers:
            self._done.add(self._peers[connection].rank)
        real["_heard"](self, connection, message, now)

    patch.setattr(Coordinator, "_heard", heard)


def continues_after_it_was_stopped(patch) -> None:
    def awake(self, now):
        self._signed = max(self._signed, now - self._silence_s)
        return real["awake"](self, now)

    patch.setattr(Coordinator, "awake", awake)


def waits_for_those_who_hang(patch) -> None:
    patch.setattr(Coordinator, "_drop_hanging", lambda self: None)


def takes_those_who_have_yet_to_come_for_hanging(patch) -> None:
    def drop_hanging(self):
        if self._stalled is not None and self._stalled[1] - self._stalled[0] >= 5.0:
            self._lose({rank: "it hangs" for rank in self._voters() if rank not in self._votes})

    patch.setattr(Coordinator, "_drop_hanging", drop_hanging)


def gives_those_who_come_during_a_stall_no_time_to_vote(patch) -> None:
    def hello(self, *about):
        before = self._stalled
        real["_hello"](self, *about)
        self._stalled = before

    patch.setattr(Coordinator, "_hello", hello)


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
            scenarios.test_a_client_dropped_by_a_decision_that_the_next_coordinator_has_not_heard_stays_out,
        ),
        (lets_in_who_is_not_let_in, scenarios.test_nobody_comes_in_unless_all_are_open_to_it),
        (lets_in_during_a_loss, scenarios.test_nobody_comes_in_with_a_decision_that_another_one_is_lost_by),
        (
            interrupts_nobody_after_a_missed_decision,
            scenarios.test_a_client_that_is_given_a_decision_after_a_loss_waits_for_nobody_lost,
        ),
        (interrupts_nobody, scenarios.test_a_client_that_dies_takes_its_ranks_along_and_the_others_continue),
        (
            hears_processes_that_were_dropped,
            scenarios.test_processes_that_were_dropped_do_not_take_the_place_of_new_ones,
        ),
        (is_silent_until_it_is_active, scenarios.test_a_client_that_is_cut_off_from_a_living_coordinator_leaves),
        (
            takes_silence_for_being_cut_off,
            scenarios.test_a_next_coordinator_that_was_stopped_for_a_while_is_waited_for,
        ),
        (
            waits_for_a_welcome_less_than_for_other_messages,
            scenarios.test_a_next_coordinator_that_is_stopped_between_two_hellos_of_a_client_is_lost_to_both_ranks_alike,
        ),
        (remembers_goodbyes, scenarios.test_the_goodbye_of_a_rank_whose_client_was_dropped_is_forgotten),
        (hears_goodbyes_of_who_is_out, scenarios.test_the_late_goodbye_of_a_dropped_client_does_not_count),
        (continues_after_it_was_stopped, scenarios.test_coordinators_that_were_stopped_are_lost_and_learn_it_later),
        (waits_for_those_who_hang, lambda: scenarios.test_a_client_that_hangs_is_dropped(1, True)),
        (
            takes_those_who_have_yet_to_come_for_hanging,
            lambda: scenarios.test_a_client_that_comes_late_during_a_stall_is_waited_for(8.0),
        ),
        (
            gives_those_who_come_during_a_stall_no_time_to_vote,
            scenarios.test_a_client_that_comes_during_a_stall_has_time_to_vote,
        ),
        (does_not_vote_again, scenarios.test_coordinators_are_lost_one_after_the_other),
    ],
    ids=lambda each: each.__name__ if each.__name__ in globals() else "",
)
def test_each_mistake_in_the_protocol_is_found_by_its_schedule(
    mistake: Callable, schedule: Callable, monkeypatch
) -> None:
    mistake(monkeypatch)
    with pytest.raises(AssertionError):  # Violation is one
        schedule()

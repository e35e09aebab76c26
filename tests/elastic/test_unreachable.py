"""Who leaves when some clients cannot reach each other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deca_ds.elastic.decision import OPEN, YES
from deca_ds.elastic.unreachable import Attempts, pairs_apart, vote, who_leaves
from deca_ds.errors import GossipError

TOTAL = 7
clients = st.lists(st.integers(0, TOTAL - 1), min_size=2, unique=True)
edges = st.sets(st.tuples(st.integers(0, TOTAL - 1), st.integers(0, TOTAL - 1)).filter(lambda e: e[0] != e[1]))


@given(clients, edges)
def test_one_agreement_tells_all_who_cannot_reach_whom(clients, seen):
    yes = -1
    for client in clients:
        out_of_reach = [other for one, other in seen if one == client]
        yes &= vote(not out_of_reach, client, out_of_reach, TOTAL)
    among = {(min(e), max(e)) for e in seen if e[0] in clients and e[1] in clients}
    assert pairs_apart(yes, clients, TOTAL) == among
    assert bool(yes & YES) == (not any(one in clients for one, _ in seen))
    assert not yes & OPEN, "nobody is let in during a regrouping"


@given(clients, edges)
def test_without_those_who_leave_no_pair_is_apart_and_nobody_leaves_in_vain(clients, seen):
    apart = {(min(e), max(e)) for e in seen if e[0] in clients and e[1] in clients}
    leaving = who_leaves(apart, clients)
    assert not [pair for pair in apart if not set(pair) & set(leaving)]
    assert len(set(leaving)) == len(leaving) <= len(apart)


def test_the_client_that_most_cannot_reach_leaves_and_of_a_pair_the_last_in_the_line():
    assert who_leaves({(0, 3), (1, 3), (2, 3)}, [3, 0, 1, 2]) == [3]
    assert who_leaves({(1, 4)}, [0, 4, 2, 1]) == [1]
    assert who_leaves(set(), [0, 1]) == []


def test_a_pair_is_apart_that_was_so_twice_and_attempts_are_bounded():
    attempts = Attempts()
    assert attempts.failed((0, 1, 2), {(1, 2)}) == []
    assert attempts.failed((0, 1, 2), {(0, 1)}) == []
    assert attempts.failed((0, 1), {(0, 1)}) == [], "others: counted anew"
    assert attempts.failed((0, 1), {(0, 1)}) == [1]
    attempts = Attempts()
    for _ in range(3):
        assert attempts.failed((0, 1, 2), set()) == []
    with pytest.raises(GossipError, match="3 clients have failed 4 times to reconnect"):
        attempts.failed((0, 1, 2), set())

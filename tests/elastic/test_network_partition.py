"""Which part of a split network goes first, and that the other one finds it."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from quorum_job import Job, answering, wait_until_connected

from deca_ds.elastic.network_partition import Lookout, clients_at, goes_first
from deca_ds.launch.view import Membership, View

pytestmark = pytest.mark.timeout(200)


@given(st.lists(st.integers(0, 30), min_size=2, unique=True), st.data())
def test_of_two_parts_exactly_one_goes_first(clients, data):
    cut = data.draw(st.integers(1, len(clients) - 1))
    part, other = clients[:cut], clients[cut:]
    assert goes_first(part, other) != goes_first(other, part)
    if len(part) != len(other):
        assert goes_first(part, other) == (len(part) > len(other))


def test_a_smaller_part_finds_the_coordinator_of_the_larger():
    job = Job(3)
    wait_until_connected(job)
    addresses = {client: each.address for client, each in enumerate(job.servers)}
    assert clients_at(addresses[0]) == []  # it has nobody in training yet
    job.servers[0].invite({})
    assert clients_at(addresses[0]) == [0, 1, 2] and clients_at(addresses[1]) == []
    cases = [((5,), 5, 1, True), ((3, 4, 5), 3, 3, True)]
    cases += [((3, 4, 5), 4, 1, False), ((3, 4, 5, 6), 3, 1, False)]  # not the first of its part; the larger part
    cases += [((2, 3), 2, 1, False), ((5,), 5, 4, False)]  # it counts client 2, which is here; it is too small
    for part, client, min_clients, found in cases:
        view = Membership(View(1, part, 7))
        looking = Lookout(view, SimpleNamespace(addresses=addresses), client, min_clients, every_s=0.05)
        deadline = time.monotonic() + (60 if found else 0.5)
        while time.monotonic() < deadline and not looking.found:
            time.sleep(0.02)
        assert looking.found == found, part
        looking.found = True  # ends its thread


@pytest.mark.parametrize("answer", [{}, {"clients": None}, {"clients": ["x"]}, {"clients": [[1]]}])
def test_a_stranger_at_a_coordinators_address_has_no_clients(answer):
    with answering(json.dumps(answer).encode() + b"\n") as (address, _):
        assert clients_at(address) == []


def test_an_answer_may_come_in_pieces():
    with answering(b'{"kind": "part", "clien', b'ts": [3, 4]}\n') as (address, _):
        assert clients_at(address) == [3, 4]

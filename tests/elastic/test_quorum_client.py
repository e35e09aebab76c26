"""The sockets and threads around the membership protocol: votes, and the ends of connections.

What the protocol itself does is in test_scenarios.py and test_protocol.py.
"""

from __future__ import annotations

import errno
import os
import socket

import pytest
from jobs import wait_until
from quorum_job import Job, wait_until_connected

from deca_ds.elastic.decision import YES
from deca_ds.elastic.quorum_client import QuorumClient
from deca_ds.elastic.quorum_server import QuorumServer
from deca_ds.errors import CutOffError, GossipError
from deca_ds.launch.launcher import ClientLayout

pytestmark = pytest.mark.timeout(200)


def test_the_decision_is_the_and_of_all_answers_and_the_lowest_ranks_news():
    job = Job(3, ranks=2)
    first = job.vote({0: 7, 1: 7, 2: 5, 3: 7, 4: 7, 5: 6}, announcement="from ")
    assert all(decision == first[0] for decision in first.values())
    assert (first[0].number, first[0].yes, first[0].announcement, first[0].clients) == (1, 4, "from 0", (0, 1, 2))
    assert job.vote(dict.fromkeys(range(6), 3))[5].yes == 3


def test_the_coordinator_is_lost_and_the_one_after_it():
    job = Job(4)
    wait_until_connected(job)
    job.end(0)
    assert all(job.votes[rank].interrupted.wait(60) for rank in (1, 2, 3))
    decided = job.vote({1: 1, 2: 1, 3: 1}, announcement="now ")
    assert {(each.number, each.clients, each.announcement) for each in decided.values()} == {(2, (1, 2, 3), "now 1")}
    job.end(1)
    decided = job.vote({2: 1, 3: 3})
    assert {(each.number, each.clients, each.yes) for each in decided.values()} == {(3, (2, 3), 1)}
    assert not job.votes[2].interrupted.is_set() and job.votes[0].cut_off.is_set()
    for _ in range(2):
        assert isinstance(job.vote({0: 1})[0], CutOffError)


def test_a_coordinator_that_says_nothing_is_lost():
    layout = ClientLayout(2, 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        own = QuorumServer(layout, 1, "127.0.0.1", 100.0, range(2), 100.0)
        addresses = {0: silent.getsockname(), 1: own.address}
        votes = QuorumClient(1, layout, addresses, 1.0, 60.0, own)
        assert votes.interrupted.wait(60)
        wait_until(lambda: votes._voter.coordinator == 1 and votes._line is not None, "with its own coordinator")
        votes._timeout_s = 100.0
        assert votes.vote(YES).clients == (1,)


def test_a_rank_that_does_not_vote_is_an_error_with_a_time_limit():
    job = Job(2, timeout_s=1.0)
    error = job.vote({0: 1})[0]
    assert isinstance(error, GossipError) and "no agreement within 1 s" in str(error)


def test_strangers_and_goodbyes_put_nobody_out():
    job = Job(2)
    wait_until_connected(job)
    for text in (
        b"GET / HTTP/1.1\r\n\r\n",
        b'{"kind": "hello"}\n',
        b'{"kind": "hello", "rank": 99, "last": {}}\n',
        b"[1]\n",
    ):
        with socket.create_connection(job.servers[0].address) as stranger:
            stranger.sendall(text)
    assert job.vote({0: 1, 1: 1})[0].clients == (0, 1)
    job.votes[1].close()
    job.votes[1]._line.connection.shutdown(socket.SHUT_RDWR)
    assert job.vote({0: 1})[0].clients == (0, 1)


def test_a_coordinator_that_cannot_take_a_connection_for_a_while_takes_it_later(monkeypatch, capsys):
    """As long as its process has too many files open."""
    accept, refusals = socket.socket.accept, [OSError(errno.EMFILE, os.strerror(errno.EMFILE))] * 3

    def refusing(server):
        if refusals:
            raise refusals.pop()
        return accept(server)

    monkeypatch.setattr(socket.socket, "accept", refusing)
    job = Job(2, silence_s=2.0)
    wait_until_connected(job)
    assert not refusals
    assert "cannot take a connection for now: Too many open files" in capsys.readouterr().err

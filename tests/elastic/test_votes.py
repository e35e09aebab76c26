"""The sockets and threads around the membership protocol: votes, ends of connections, joining, and looking for others.

What the protocol itself does is in test_scenarios.py and test_protocol.py.
"""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jobs import wait_until
from torch.distributed import TCPStore

from deca_ds.elastic.agreement import OPEN, YES, Decision
from deca_ds.elastic.network_partition import Lookout, clients_at, goes_first
from deca_ds.elastic.quorum_client import QuorumClient
from deca_ds.elastic.quorum_server import QuorumServer
from deca_ds.elastic.rejoin import join_job, save_addresses
from deca_ds.errors import CutOffError, GossipError, LaunchError
from deca_ds.launch.launcher import ClientLayout, Launch
from deca_ds.launch.store import join_job_store
from deca_ds.launch.view import Membership, View

pytestmark = pytest.mark.timeout(200)


def test_an_invitation_to_a_store_that_has_gone_is_not_waited_for():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = closed.getsockname()
    with pytest.raises(LaunchError, match="the job's store is out of reach"):
        join_job_store(address, 600.0, answer_s=1.0)


class Job:
    """n clients of k ranks in threads; `kill` breaks a client's connections, like the end of its processes."""

    def __init__(self, clients: int, ranks: int = 1, timeout_s: float = 20.0, silence_s: float = 60.0):
        self.layout = ClientLayout(clients, ranks)
        self.servers = [
            QuorumServer(self.layout, client, "127.0.0.1", timeout_s, range(clients), silence_s)
            for client in range(clients)
        ]
        addresses = {client: each.address for client, each in enumerate(self.servers)}
        self.votes = [
            QuorumClient(rank, self.layout, addresses, timeout_s, silence_s) for rank in range(clients * ranks)
        ]

    def vote(self, bits: dict[int, int], news: str = "") -> dict[int, Decision | Exception]:
        def one(rank: int):
            try:
                return self.votes[rank].vote(bits[rank], f"{news}{rank}")
            except Exception as error:
                return error

        with ThreadPoolExecutor(len(bits)) as pool:
            return dict(zip(bits, pool.map(one, bits), strict=True))

    def end(self, client: int) -> None:
        """Like the end of its processes: connections break, nobody listens."""
        for rank in self.layout.ranks_of(client):
            votes = self.votes[rank]
            votes._do(votes._voter.heard({"kind": "out", "why": "it has ended"}, 0.0))  # it looks for nobody
            votes._line.end()
        server = self.servers[client]
        server._coordinator.retired = True  # its thread closes all


def wait_until_connected(job: Job) -> None:
    assert {decision.yes for decision in job.vote(dict.fromkeys(range(len(job.votes)), 1)).values()} == {1}


def test_the_decision_is_the_and_of_all_answers_and_the_lowest_ranks_news():
    job = Job(3, ranks=2)
    first = job.vote({0: 7, 1: 7, 2: 5, 3: 7, 4: 7, 5: 6}, news="from ")
    assert all(decision == first[0] for decision in first.values())
    assert (first[0].number, first[0].yes, first[0].news, first[0].clients) == (1, 4, "from 0", (0, 1, 2))
    assert job.vote(dict.fromkeys(range(6), 3))[5].yes == 3


def test_the_coordinator_is_lost_and_the_one_after_it():
    job = Job(4)
    wait_until_connected(job)
    job.end(0)
    assert all(job.votes[rank].interrupted.wait(60) for rank in (1, 2, 3))
    decided = job.vote({1: 1, 2: 1, 3: 1}, news="now ")
    assert {(each.number, each.clients, each.news) for each in decided.values()} == {(2, (1, 2, 3), "now 1")}
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


_stores: list[TCPStore] = []


def invitation(job: Job) -> dict:
    """To a store of its own."""
    _stores.append(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
    addresses = [(client, *each.address) for client, each in enumerate(job.servers)]
    return {"store": ("127.0.0.1", _stores[-1].port), "addresses": addresses}


def come_back(job: Job, client: int, tmp_path) -> QuorumClient:
    """A new process of a client that has gone."""
    save_addresses(tmp_path, job.votes[2].addresses)
    launch = Launch("deepspeed", client, len(job.votes), 0, None)
    asked, _ = join_job(launch, job.layout, tmp_path, 10.0, 60.0)
    return QuorumClient(client, job.layout, asked.addresses, 20.0, 60.0, asked.own, asked)


def test_a_client_comes_back_when_all_are_open_to_it_and_last_in_the_line(tmp_path):
    job = Job(3)
    wait_until_connected(job)
    job.end(0)
    assert {decision.clients for decision in job.vote({1: 1, 2: 1}).values()} == {(1, 2)}
    job.servers[1].invite(invitation(job))
    votes = come_back(job, 0, tmp_path)
    with ThreadPoolExecutor(1) as pool:
        entering = pool.submit(votes.enter)
        rejoining = job.servers[1]._coordinator._rejoining
        wait_until(lambda: 0 in rejoining and rejoining[0].ready, "at the door")
        assert job.vote({1: YES | OPEN, 2: YES})[1].joining == (), "client 2 cannot have it come in now"
        assert job.vote({1: OPEN, 2: YES | OPEN})[1].joining == (), "this one did not count"
        decided = job.vote({1: YES | OPEN, 2: YES | OPEN})
        assert decided[1] == decided[2] == entering.result(60)
    assert decided[1].clients == (1, 2) and decided[1].everybody == (1, 2, 0)
    job.votes[0] = votes
    assert {each.clients for each in job.vote({0: 1, 1: 1, 2: 1}).values()} == {(1, 2, 0)}
    job.end(1)
    decided = job.vote({0: 1, 2: 1}, news="by ")
    assert {(each.clients, each.news) for each in decided.values()} == {((2, 0), "by 2")}
    job.end(2)
    assert job.vote({0: 1})[0].clients == (0,), "its own coordinator, which is a new one, has taken over"


def test_a_client_that_is_still_in_cannot_join_and_a_guest_that_goes_is_forgotten(tmp_path):
    job = Job(3)
    wait_until_connected(job)
    job.servers[0].invite(invitation(job))
    with pytest.raises(LaunchError, match="client 1 is still in the job"):
        come_back(job, 1, tmp_path)
    job.end(1)
    assert job.vote({0: 1, 2: 1})[0].clients == (0, 2)
    come_back(job, 1, tmp_path)._line.end()
    wait_until(lambda: not job.servers[0]._coordinator._rejoining, "forgotten")
    decision = job.vote({0: YES | OPEN, 2: YES | OPEN})[0]
    assert (decision.clients, decision.joining) == ((0, 2), ())


def test_of_two_processes_that_join_as_one_rank_the_first_is_told(tmp_path):
    job = Job(3)
    wait_until_connected(job)
    job.servers[0].invite(invitation(job))
    job.end(1)
    assert job.vote({0: 1, 2: 1})[0].clients == (0, 2)
    first = come_back(job, 1, tmp_path)
    with ThreadPoolExecutor(1) as pool:
        entering = pool.submit(first.enter)
        come_back(job, 1, tmp_path)
        with pytest.raises(CutOffError, match="another process has asked to join as rank 1"):
            entering.result(60)


def test_a_client_that_finds_nobody_to_join_says_so(tmp_path):
    launch = Launch("deepspeed", 1, 2, 0, None)
    with pytest.raises(LaunchError, match="no addresses of a job to join"):
        join_job(launch, ClientLayout(2, 1), tmp_path, 5.0, 60.0)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = closed.getsockname()
    save_addresses(tmp_path, {0: address, 1: address})
    with pytest.raises(LaunchError, match="no other client answers"):
        join_job(launch, ClientLayout(2, 1), tmp_path, 5.0, 60.0)


def test_a_client_asks_again_until_its_time_is_over(tmp_path):
    job = Job(3)
    wait_until_connected(job)
    job.end(2)
    assert job.vote({0: 1, 1: 1})[0].clients == (0, 1)
    launch = Launch("deepspeed", 2, 3, 0, None)
    addresses = job.votes[0].addresses
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = closed.getsockname()
    save_addresses(tmp_path, {0: nobody, 2: addresses[2]})
    started = time.time()
    with pytest.raises(LaunchError, match="no other client answers"):
        join_job(launch, job.layout, tmp_path, 5.0, 60.0, until=started + 0.5, pause_s=0.1)
    assert time.time() > started + 0.5
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(join_job, launch, job.layout, tmp_path, 5.0, 60.0, started + 90, pause_s=0.1)
        save_addresses(tmp_path, addresses)  # in reach, but nobody has an invitation yet
        job.servers[0].invite(invitation(job))
        found, _ = asking.result(timeout=100)
    assert found.coordinator == 0 and found.invitation["clients"] == [0, 1]


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

"""Agreements without MPI: ranks as threads, connections that break, coordinators that are lost."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import TCPStore

from deca_ds.elastic import client as client_module
from deca_ds.elastic import partition, rejoin, server
from deca_ds.elastic.agreement import OPEN, YES, Decision
from deca_ds.elastic.client import QuorumClient
from deca_ds.elastic.partition import Lookout, clients_at, goes_first
from deca_ds.elastic.rejoin import join_job, save_addresses
from deca_ds.elastic.server import QuorumServer
from deca_ds.errors import CutOffError, GossipError, LaunchError, RankLostError
from deca_ds.launch import store
from deca_ds.launch.launcher import ClientLayout, Launch
from deca_ds.launch.view import Membership, View

pytestmark = pytest.mark.timeout(60)


class Job:
    """n clients of k ranks in threads; `kill` breaks a client's connections, like the end of its processes."""

    def __init__(self, clients: int, ranks: int = 1, timeout_s: float = 20.0, silence_s: float = 60.0):
        self.layout = ClientLayout(clients, ranks)
        self.coordinators = [
            QuorumServer(self.layout, client, "127.0.0.1", timeout_s, range(clients), silence_s)
            for client in range(clients)
        ]
        addresses = {client: each.address for client, each in enumerate(self.coordinators)}
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

    def kill(self, client: int) -> None:
        for rank in range(client * self.layout.ranks_per_client, (client + 1) * self.layout.ranks_per_client):
            self.votes[rank]._lost = list(range(self.layout.clients))  # it looks for nobody
            self.votes[rank]._line.connection.shutdown(socket.SHUT_RDWR)
        dead = self.coordinators[client]
        dead._server.close()
        for line in list(dead._lines.values()):
            with contextlib.suppress(OSError):  # its thread was faster
                line.connection.shutdown(socket.SHUT_RDWR)


def wait_until_connected(job: Job) -> None:
    assert {decision.yes for decision in job.vote(dict.fromkeys(range(len(job.votes)), 1)).values()} == {1}


def test_the_decision_is_the_and_of_all_answers_and_the_lowest_ranks_news():
    job = Job(3, ranks=2)
    first = job.vote({0: 7, 1: 7, 2: 5, 3: 7, 4: 7, 5: 6}, news="from ")
    assert all(decision == first[0] for decision in first.values())
    assert (first[0].number, first[0].yes, first[0].news, first[0].clients) == (1, 4, "from 0", (0, 1, 2))
    assert job.vote(dict.fromkeys(range(6), 3))[5].yes == 3


def test_a_client_that_ends_is_out_as_a_whole_and_interrupts_the_others():
    job = Job(3, ranks=2)
    wait_until_connected(job)
    job.votes[3]._line.connection.shutdown(socket.SHUT_RDWR)  # one rank of client 1
    for rank in (0, 1, 4, 5):
        assert job.votes[rank].interrupted.wait(10)
    decided = job.vote({0: 1, 1: 1, 2: 1, 4: 1, 5: 1})
    assert isinstance(decided.pop(2), RankLostError)
    assert {decision.clients for decision in decided.values()} == {(0, 2)}
    assert not any(job.votes[rank].interrupted.is_set() for rank in (0, 1, 4, 5))
    assert job.vote(dict.fromkeys((0, 1, 4, 5), 1))[0].yes == 1


def test_the_coordinator_is_lost_and_the_one_after_it():
    job = Job(4)
    wait_until_connected(job)
    job.kill(0)
    decided = job.vote({1: 1, 2: 1, 3: 1}, news="now ")
    assert {(each.number, each.clients, each.news) for each in decided.values()} == {(2, (1, 2, 3), "now 1")}
    job.kill(1)
    decided = job.vote({2: 1, 3: 3})
    assert {(each.number, each.clients, each.yes) for each in decided.values()} == {(3, (2, 3), 1)}


def test_a_decision_that_only_some_have_got_counts_for_all(monkeypatch):
    """Client 0's coordinator tells rank 1 alone, and is lost."""
    job = Job(3)
    wait_until_connected(job)
    tell, told = QuorumServer._tell, threading.Event()

    def partly(self, line):
        if self is not job.coordinators[0] or line.rank == 1:
            tell(self, line)
            told.set()

    monkeypatch.setattr(QuorumServer, "_tell", partly)
    with ThreadPoolExecutor(3) as pool:
        voting = [pool.submit(job.votes[rank].vote, 1) for rank in range(3)]
        assert told.wait(10)
        job.kill(0)
        assert voting[1].result(20) == voting[2].result(20)
        assert (voting[2].result().number, voting[2].result().clients) == (2, (0, 1, 2))
        with pytest.raises(RankLostError):
            voting[0].result(20)
    assert {decision.clients for decision in job.vote({1: 1, 2: 1}).values()} == {(1, 2)}


def test_who_does_not_come_to_the_next_coordinator_is_out(monkeypatch):
    monkeypatch.setattr(server, "GRACE_S", 1.0)
    job = Job(3)
    wait_until_connected(job)
    job.kill(2)
    job.kill(0)
    decided = job.vote({1: 1})
    assert decided[1].clients == (1,)


def test_who_is_cut_off_from_a_living_coordinator_leaves(monkeypatch):
    monkeypatch.setattr(client_module, "GRACE_S", 0.5)
    job = Job(3)
    wait_until_connected(job)
    job.votes[2]._line.connection.shutdown(socket.SHUT_RDWR)
    decided = job.vote({0: 1, 1: 1, 2: 1})
    assert isinstance(decided[2], RankLostError) and "cut off" in str(decided[2])
    assert decided[0].clients == (0, 1)


def test_a_rank_that_does_not_vote_is_an_error_with_a_time_limit():
    job = Job(2, timeout_s=1.0)
    error = job.vote({0: 1})[0]
    assert isinstance(error, GossipError) and "no agreement within 1 s" in str(error)


def stall(job: Job, ranks: tuple[int, ...], seconds: float, *voting: Future) -> None:
    """What the guards of these ranks do while nobody moves on."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not any(each.done() for each in voting):
        for rank in ranks:
            job.votes[rank].stalled()
        time.sleep(0.1)


@pytest.mark.parametrize("hanging", [1, 0], ids=["another client", "the coordinator's own client"])
def test_who_hangs_is_put_out(monkeypatch, hanging):
    monkeypatch.setattr(server, "_PATIENCE_S", 0.5)
    job = Job(3, ranks=2)
    wait_until_connected(job)
    hangs, *others = [2 * hanging + 1, *(rank for rank in range(6) if rank != 2 * hanging + 1)]
    with ThreadPoolExecutor(6) as pool:
        voting = {rank: pool.submit(job.votes[rank].vote, 1) for rank in others if rank != 5}
        job.votes[5].stalled()  # waits for a message that will not come
        assert job.votes[5].interrupted.wait(5)
        voting[5] = pool.submit(job.votes[5].vote, 0)
        stall(job, tuple(others), 20.0, *voting.values())
        decided = {voting[rank].result(20) for rank in others if rank // 2 != hanging}
        assert {each.clients for each in decided} == {tuple(c for c in range(3) if c != hanging)}
        with pytest.raises(CutOffError):
            voting[2 * hanging].result(20)
    assert job.votes[hangs].cut_off.wait(5)
    assert isinstance(job.vote({hangs: 1})[hangs], CutOffError)
    left = [rank for rank in others if rank // 2 != hanging]
    assert {each.yes for each in job.vote(dict.fromkeys(left, 1)).values()} == {1}
    assert not any(job.votes[rank].interrupted.is_set() for rank in left)


def test_nobody_is_put_out_who_comes_on_after_all(monkeypatch):
    monkeypatch.setattr(server, "_PATIENCE_S", 0.5)
    monkeypatch.setattr(server, "_HANGING_S", 0.3)
    job = Job(3)
    wait_until_connected(job)
    with ThreadPoolExecutor(3) as pool:
        voting = [pool.submit(job.votes[rank].vote, 1) for rank in (0, 1)]
        time.sleep(0.2)
        stall(job, (0, 1), 0.3)  # then rank 2 is seen to move on
        time.sleep(0.5)
        stall(job, (0, 1), 0.2)
        voting.append(pool.submit(job.votes[2].vote, 1))
        assert {each.result(20).clients for each in voting} == {(0, 1, 2)}


def freeze(job: Job, client: int, monkeypatch) -> threading.Event:
    """Client's coordinator does nothing any more, like that of a process that is stopped, until the event is set."""
    goes_on, select = threading.Event(), server.QuorumServer._sign

    def waits(self):
        if self is job.coordinators[client]:
            goes_on.wait()
        select(self)

    monkeypatch.setattr(server.QuorumServer, "_sign", waits)
    time.sleep(0.6)
    return goes_on


def test_a_coordinator_that_keeps_silent_is_lost_and_knows_it_later(monkeypatch):
    monkeypatch.setattr(client_module, "GRACE_S", 0.5)  # the next one is silent, too, and is given twice as long
    job = Job(4, silence_s=2.0)
    wait_until_connected(job)
    stopped = [freeze(job, client, monkeypatch) for client in (0, 1)]
    for client in (0, 1):
        monkeypatch.setattr(job.votes[client], "_listen", lambda _, client=client: stopped[client].wait())
    decided = job.vote({2: 1, 3: 1}, news="by ")
    assert {(each.clients, each.news) for each in decided.values()} == {((2, 3), "by 2")}
    monkeypatch.undo()
    for each in stopped:
        each.set()
    deadline = time.monotonic() + 10
    while not all(job.coordinators[client]._retired for client in (0, 1)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert job.vote({2: 1, 3: 1})[2].clients == (2, 3)
    error = job.vote({0: 1})[0]
    assert isinstance(error, CutOffError), "its own coordinator does not take it for the last one that is left"


def test_strangers_and_goodbyes_put_nobody_out():
    job = Job(2)
    wait_until_connected(job)
    for text in (
        b"GET / HTTP/1.1\r\n\r\n",
        b'{"kind": "hello"}\n',
        b'{"kind": "hello", "rank": 99, "last": {}}\n',
        b"[1]\n",
    ):
        with socket.create_connection(job.coordinators[0].address) as stranger:
            stranger.sendall(text)
    assert job.vote({0: 1, 1: 1})[0].clients == (0, 1)
    job.votes[1].close()
    job.votes[1]._line.connection.shutdown(socket.SHUT_RDWR)
    assert job.vote({0: 1})[0].clients == (0, 1)


_stores: list[TCPStore] = []


def invitation(job: Job) -> dict:
    """To a store of its own."""
    _stores.append(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
    addresses = [(client, *each.address) for client, each in enumerate(job.coordinators)]
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
    job.kill(0)
    assert {decision.clients for decision in job.vote({1: 1, 2: 1}).values()} == {(1, 2)}
    job.coordinators[1].invitation = invitation(job)
    votes = come_back(job, 0, tmp_path)
    with ThreadPoolExecutor(1) as pool:
        entering = pool.submit(votes.enter)
        time.sleep(0.3)
        assert job.vote({1: YES | OPEN, 2: YES})[1].joining == (), "client 2 cannot have it come in now"
        assert job.vote({1: OPEN, 2: YES | OPEN})[1].joining == (), "this one did not count"
        decided = job.vote({1: YES | OPEN, 2: YES | OPEN})
        assert decided[1] == decided[2] == entering.result(10)
    assert decided[1].clients == (1, 2) and decided[1].everybody == (1, 2, 0)
    job.votes[0] = votes
    assert {each.clients for each in job.vote({0: 1, 1: 1, 2: 1}).values()} == {(1, 2, 0)}
    job.kill(1)
    decided = job.vote({0: 1, 2: 1}, news="by ")
    assert {(each.clients, each.news) for each in decided.values()} == {((2, 0), "by 2")}
    job.kill(2)
    assert job.vote({0: 1})[0].clients == (0,), "its own coordinator, which is a new one, has taken over"


def test_the_goodbye_of_who_was_put_out_before_does_not_count(monkeypatch, tmp_path):
    """A process that was stopped, and put out, says goodbye when it runs again: its client comes back all the same."""
    monkeypatch.setattr(server, "_PATIENCE_S", 0.2)
    job = Job(3)
    wait_until_connected(job)
    old = job.votes[1]._line
    with ThreadPoolExecutor(2) as pool:
        voting = [pool.submit(job.votes[rank].vote, 1) for rank in (0, 2)]
        stall(job, (0, 2), 20.0, *voting)
        assert {each.result(10).clients for each in voting} == {(0, 2)}
    job.votes[1].cut_off.wait(5)
    job.votes[1].close()
    old.send("goodbye")
    job.coordinators[0].invitation = invitation(job)
    votes = come_back(job, 1, tmp_path)
    with ThreadPoolExecutor(1) as pool:
        entering = pool.submit(votes.enter)
        time.sleep(0.3)
        job.vote({0: YES | OPEN, 2: YES | OPEN})
        assert entering.result(10).everybody == (0, 2, 1)
    job.votes[1] = votes
    assert {each.yes for each in job.vote({0: 1, 1: 0, 2: 1}).values()} == {0}, "its vote is waited for"


def test_a_client_waits_for_the_store_that_it_was_invited_to_whenever_its_first_rank_came(tmp_path):
    job = Job(2, ranks=2)
    wait_until_connected(job)
    job.kill(1)
    assert job.vote({0: 1, 1: 1})[0].clients == (0,)
    job.coordinators[0].invite(invitation(job))
    save_addresses(tmp_path, job.votes[0].addresses)

    def visit(rank: int) -> Decision:
        asked, _ = join_job(Launch("deepspeed", rank, 4, 0, None), job.layout, tmp_path, 10.0, 60.0)
        return QuorumClient(rank, job.layout, asked.addresses, 20.0, 60.0, asked.own, asked).enter()

    with ThreadPoolExecutor(2) as pool:
        visits = [pool.submit(visit, 2)]
        time.sleep(0.3)
        job.coordinators[0].invite(invitation(job))  # the job moves before the client's other rank comes
        visits.append(pool.submit(visit, 3))
        time.sleep(0.5)
        job.vote({0: YES | OPEN, 1: YES | OPEN})
        assert {each.result(10).everybody for each in visits} == {(0, 1)}


def test_who_waits_to_come_in_learns_of_those_who_came_before_and_of_a_store_that_moved(tmp_path):
    job = Job(4)
    wait_until_connected(job)
    for client in (1, 3):
        job.kill(client)
    assert job.vote({0: 1, 2: 1})[0].clients == (0, 2)
    job.coordinators[0].invitation = invitation(job)
    first, second = (come_back(job, client, tmp_path) for client in (1, 3))
    with ThreadPoolExecutor(2) as pool:
        entering = pool.submit(first.enter)
        time.sleep(0.3)
        job.vote({0: YES | OPEN, 2: YES | OPEN})
        assert entering.result(10).everybody == (0, 2, 1)
        job.votes[1] = first
        moved = [(client, *address) for client, address in job.votes[0].addresses.items()]
        job.coordinators[0].invitation = job.coordinators[0].invitation | {"addresses": moved}
        entering = pool.submit(second.enter)
        time.sleep(0.3)
        job.vote(dict.fromkeys((0, 1, 2), YES | OPEN))
        assert entering.result(10).everybody == (0, 2, 1, 3)
        assert second.addresses == job.votes[0].addresses == first.addresses
        job.votes[3] = second
        job.kill(2)
        assert job.vote(dict.fromkeys((0, 1, 3), 1))[0].clients == (0, 1, 3)
        current = [(client, *address) for client, address in job.votes[0].addresses.items()]
        job.coordinators[0].invitation = job.coordinators[0].invitation | {"addresses": current}
        entering = pool.submit(come_back(job, 2, tmp_path).enter)
        time.sleep(0.3)
        job.coordinators[0].invitation = invitation(job)
        assert job.vote(dict.fromkeys((0, 1, 3), YES | OPEN))[0].joining == ()
        with pytest.raises(CutOffError, match="moved to another store"):
            entering.result(10)


def test_nobody_comes_in_with_a_decision_that_another_one_is_lost_by(tmp_path):
    """The others have to meet anew first: whom they have lost is all that such a decision tells them."""
    job = Job(4)
    wait_until_connected(job)
    job.kill(3)
    job.vote(dict.fromkeys(range(3), 1))
    job.coordinators[0].invitation = invitation(job)
    votes = come_back(job, 3, tmp_path)
    with ThreadPoolExecutor(4) as pool:
        entering = pool.submit(votes.enter)
        time.sleep(0.3)
        voting = [pool.submit(job.votes[rank].vote, YES | OPEN) for rank in (0, 1)]
        time.sleep(0.3)
        job.kill(2)
        decided = {each.result(10) for each in voting}
        assert {(each.clients, each.yes, each.joining) for each in decided} == {((0, 1), YES | OPEN, ())}
        assert job.vote({0: YES | OPEN, 1: YES | OPEN})[0].joining == entering.result(10).joining != ()


def test_who_is_still_in_cannot_join_and_a_guest_that_goes_is_forgotten(tmp_path):
    job = Job(3)
    wait_until_connected(job)
    job.coordinators[0].invitation = invitation(job)
    with pytest.raises(LaunchError, match="client 1 is still in the job"):
        come_back(job, 1, tmp_path)
    job.kill(1)
    assert job.vote({0: 1, 2: 1})[0].clients == (0, 2)
    come_back(job, 1, tmp_path)._visit.line.connection.shutdown(socket.SHUT_RDWR)
    time.sleep(0.3)
    decision = job.vote({0: YES | OPEN, 2: YES | OPEN})[0]
    assert (decision.clients, decision.joining) == ((0, 2), ())


def test_nobody_to_join_is_said(tmp_path):
    launch = Launch("deepspeed", 1, 2, 0, None)
    with pytest.raises(LaunchError, match="no addresses of a job to join"):
        join_job(launch, ClientLayout(2, 1), tmp_path, 5.0, 60.0)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = closed.getsockname()
    save_addresses(tmp_path, {0: address, 1: address})
    with pytest.raises(LaunchError, match="none of the other clients is there"):
        join_job(launch, ClientLayout(2, 1), tmp_path, 5.0, 60.0)


def test_a_client_asks_again_until_its_time_is_over(tmp_path, monkeypatch):
    monkeypatch.setattr(rejoin, "_PAUSE_S", 0.1)
    job = Job(3)
    wait_until_connected(job)
    job.kill(2)
    assert job.vote({0: 1, 1: 1})[0].clients == (0, 1)
    launch = Launch("deepspeed", 2, 3, 0, None)
    addresses = job.votes[0].addresses
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = closed.getsockname()
    save_addresses(tmp_path, {0: nobody, 2: addresses[2]})
    started = time.time()
    with pytest.raises(LaunchError, match="none of the other clients is there"):
        join_job(launch, job.layout, tmp_path, 5.0, 60.0, until=started + 0.5)
    assert time.time() > started + 0.5
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(join_job, launch, job.layout, tmp_path, 5.0, 60.0, started + 30)
        save_addresses(tmp_path, addresses)  # in reach, but nobody has an invitation yet
        job.coordinators[0].invitation = invitation(job)
        found, _ = asking.result(timeout=20)
    assert found.coordinator == 0 and found.invitation["clients"] == [0, 1]


@given(st.lists(st.integers(0, 30), min_size=2, unique=True), st.data())
def test_of_two_parts_exactly_one_goes_first(clients, data):
    cut = data.draw(st.integers(1, len(clients) - 1))
    part, other = clients[:cut], clients[cut:]
    assert goes_first(part, other) != goes_first(other, part)
    if len(part) != len(other):
        assert goes_first(part, other) == (len(part) > len(other))


def test_a_smaller_part_finds_the_coordinator_of_the_larger(monkeypatch):
    monkeypatch.setattr(partition, "_EVERY_S", 0.05)
    job = Job(3)
    wait_until_connected(job)
    addresses = {client: each.address for client, each in enumerate(job.coordinators)}
    assert clients_at(addresses[0]) == []  # it has nobody in training yet
    job.coordinators[0].invite({})
    assert clients_at(addresses[0]) == [0, 1, 2] and clients_at(addresses[1]) == []
    cases = [((5,), 5, 1, True), ((3, 4, 5), 3, 3, True)]
    cases += [((3, 4, 5), 4, 1, False), ((3, 4, 5, 6), 3, 1, False)]  # not the first of its part; the larger part
    cases += [((2, 3), 2, 1, False), ((5,), 5, 4, False)]  # it counts client 2, which is here; it is too small to go on
    for part, client, min_clients, found in cases:
        view = Membership(View(1, part, 7))
        looking = Lookout(view, SimpleNamespace(addresses=addresses), client, min_clients)
        deadline = time.monotonic() + (5 if found else 0.5)
        while time.monotonic() < deadline and not looking.found:
            time.sleep(0.02)
        assert looking.found == found, part
        looking.found = True  # ends its thread


def test_an_invitation_to_a_store_that_has_gone_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(store, "_ANSWER", timedelta(seconds=1))
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = closed.getsockname()
    with pytest.raises(LaunchError, match="the job's store is out of reach"):
        store.join_job_store(address, 600.0)

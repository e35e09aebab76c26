"""Clients that ask to rejoin a job over real sockets: whom they find, and when they are let in."""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from jobs import wait_until
from quorum_job import Job, answering, wait_until_connected
from torch.distributed import TCPStore

from deca_ds.elastic.decision import OPEN, YES
from deca_ds.elastic.invitation import Invitation
from deca_ds.elastic.quorum_client import QuorumClient
from deca_ds.elastic.rejoin import join_job, save_addresses
from deca_ds.errors import AbsentError, CutOffError, LaunchError
from deca_ds.launch.launcher import ClientLayout, Launch
from deca_ds.launch.store import join_job_store

pytestmark = pytest.mark.timeout(200)


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
        entering = pool.submit(votes.wait_for_admission)
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
    decided = job.vote({0: 1, 2: 1}, announcement="by ")
    assert {(each.clients, each.announcement) for each in decided.values()} == {((2, 0), "by 2")}
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
        entering = pool.submit(first.wait_for_admission)
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
    with pytest.raises(LaunchError, match="no other client answers: the job has ended, or it is out of reach") as told:
        join_job(launch, ClientLayout(2, 1), tmp_path, 5.0, 60.0)
    assert (
        "DONE there: the job has finished" in told.value.fix
        and "deca export" in told.value.fix
        and "network" in told.value.fix
    )
    assert join_job(launch, ClientLayout(2, 1), tmp_path, 5.0, 60.0, time.time() + 600, is_over=lambda: True) is None


def test_a_client_that_comes_before_the_job_trains_is_told_who_has_answered(tmp_path):
    job = Job(3)
    wait_until_connected(job)
    with pytest.raises(LaunchError, match="though clients 0, 1 answered: the job has not begun to train yet"):
        come_back(job, 2, tmp_path)


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


def test_an_invitation_to_a_store_that_has_gone_is_not_waited_for():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = closed.getsockname()
    with pytest.raises(LaunchError, match="the job's store is out of reach"):
        join_job_store(address, 600.0, answer_s=1.0)


STRANGE = [
    b"{}\n",
    b'{"kind": 7}\n',
    b"[1]\n",
    b"HTTP/1.1 400 Bad Request\r\n",
    b"[" * 100_000 + b"\n",
    b'{"kind": "out"}\n',
]


@pytest.mark.parametrize("answer", STRANGE)
def test_a_stranger_at_a_coordinators_address_is_no_answer(tmp_path, answer):
    """And keeps no connection."""
    launch = Launch("deepspeed", 1, 2, 0, None)
    with answering(answer) as (address, connections):
        save_addresses(tmp_path, {0: address, 1: address})
        with pytest.raises(AbsentError, match="no other client answers"):
            join_job(launch, ClientLayout(2, 1), tmp_path, 5.0, 60.0)
        (connection,) = connections
        connection.settimeout(30.0)
        assert connection.recv(1) == b"", "it was closed"


def test_an_invitation_that_comes_in_pieces_is_one_and_one_that_is_taken_back_is_none(tmp_path):
    launch, layout = Launch("deepspeed", 1, 2, 0, None), ClientLayout(2, 1)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    told = {"kind": "invitation", "store": ("127.0.0.1", store.port), "addresses": [], "clients": []}
    text = json.dumps(told).encode() + b"\n"
    with answering(text[:20], text[20:]) as (address, _):
        save_addresses(tmp_path, {0: address, 1: address})
        found, _ = join_job(launch, layout, tmp_path, 60.0, 60.0)
        assert found.invitation["clients"] == [] and found.coordinator == 0
        assert found.line.connection.gettimeout() is None
    with answering(text + b'{"kind": "out", "why": "another process has asked"}\n') as (address, _):
        save_addresses(tmp_path, {0: address, 1: address})
        with pytest.raises(AbsentError, match="another process has asked"):
            join_job(launch, layout, tmp_path, 60.0, 60.0)


def test_whoever_does_not_get_in_keeps_no_connection(tmp_path):
    """A member, or the job's store, is out of reach."""
    launch = Launch("deepspeed", 1, 2, 0, None)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = closed.getsockname()
    told = {"kind": "invitation", "store": nobody, "addresses": [(0, *nobody)], "clients": [0]}
    with answering(json.dumps(told).encode() + b"\n") as (address, connections):
        save_addresses(tmp_path, {0: address, 1: address})
        with pytest.raises(AbsentError, match="cannot reach client 0 from here"):
            join_job(launch, ClientLayout(2, 1), tmp_path, 5.0, 60.0)
        (connection,) = connections
        connection.settimeout(30.0)
        assert connection.recv(1) == b"", "it was closed"


def test_a_rank_that_names_no_address_of_its_coordinator_gets_no_further(tmp_path):
    """Nobody else's connection suffers for it."""
    job = Job(3)
    wait_until_connected(job)
    job.servers[0].invite(invitation(job))
    job.end(1)
    assert job.vote({0: 1, 2: 1})[0].clients == (0, 2)
    with socket.create_connection(job.servers[0].address) as stranger:
        stranger.sendall(b'{"kind": "join", "rank": 1, "address": 7}\n{"kind": "ready"}\n')
        stranger.settimeout(30.0)
        assert stranger.recv(1) == b""
        decided = job.vote({0: YES | OPEN, 2: YES | OPEN})
    assert {(each.clients, each.joining) for each in decided.values()} == {((0, 2), ())}


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"0": 7}', '{"0": ["n0", null]}', '{"x": ["n0", 1]}'])
def test_addresses_that_are_none_are_told(tmp_path, text):
    (tmp_path / "coordinators.json").write_text(text)
    with pytest.raises(LaunchError, match="no addresses of a job to join"):
        join_job(Launch("deepspeed", 1, 2, 0, None), ClientLayout(2, 1), tmp_path, 5.0, 60.0)


def test_an_invitation_of_another_version_is_told():
    with pytest.raises(LaunchError, match="the job runs another version of deca_ds"):
        Invitation.read({"kind": "invitation", "store": ("n0", 1), "mood": "fine"})

"""Clients that ask to rejoin a job over real sockets: whom they find, and when they are let in."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from jobs import wait_until
from quorum_job import Job, wait_until_connected
from torch.distributed import TCPStore

from deca_ds.elastic.decision import OPEN, YES
from deca_ds.elastic.quorum_client import QuorumClient
from deca_ds.elastic.rejoin import join_job, save_addresses
from deca_ds.errors import CutOffError, LaunchError
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

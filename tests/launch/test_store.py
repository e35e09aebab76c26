"""Where the job's store is: IPv4 and IPv6, ports that are taken, names that stand for nothing."""

from __future__ import annotations

import signal
import socket
import threading

import pytest
from jobs import free_port

from deca_ds.elastic.quorum_server import QuorumServer
from deca_ds.errors import LaunchError
from deca_ds.launch import store as stores
from deca_ds.launch.launcher import ClientLayout, Launch
from deca_ds.launch.store import host_again, join_again, open_job_store, own_address
from deca_ds.watchdog.lifelines import Lifeline


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


ADDRESSES = ["127.0.0.1", pytest.param("::1", marks=pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here"))]


def rank(number: int, address: str, port: int) -> Launch:
    return Launch("deepspeed", number, 2, number, (address, port))


@pytest.mark.parametrize("address", ADDRESSES)
def test_all_that_listens_is_reached_at_the_address_of_the_job(address):
    port = free_port()
    job = open_job_store(rank(0, address, port), 100)
    other = open_job_store(rank(1, address, port), 100)
    job.store.set("key", "value")
    assert other.store.get("key") == b"value" and own_address((address, port)) == address
    server = job.publish_server("client")
    other.join_server("client").set("own", "value")
    assert server.get("own") == b"value"
    again = host_again(job)
    again.store.set("key", "again")
    assert again.address is not None and join_again(other, again.address).store.get("key") == b"again"
    coordinator = QuorumServer(ClientLayout(2, 1), 0, address, 100, [0, 1], 100)
    socket.create_connection(coordinator.address, 100).close()
    lines = []
    threads = [
        threading.Thread(target=lambda shard, of: lines.append(Lifeline(of, shard, 2, 100, print)), args=(shard, of))
        for shard, of in enumerate((server, other.join_server("client")))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    for line in lines:
        line.close()
    assert len(lines) == 2


def test_a_rank_that_waits_for_others_handles_signals():
    port = free_port()
    job = open_job_store(rank(0, "127.0.0.1", port), 20)
    other = open_job_store(rank(1, "127.0.0.1", port), 20)
    before = signal.signal(signal.SIGUSR1, lambda *_: other.store.set("here/1/1", "7"))  # what it waits for
    timer = threading.Timer(0.3, signal.pthread_kill, (threading.main_thread().ident, signal.SIGUSR1))
    try:
        timer.start()
        assert job.gather(rank(0, "127.0.0.1", port), "here", 5) == {0: 5, 1: 7}
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
    assert not job.comes("nobody", 0.0)


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(LaunchError, match=rf"port {port} is in use on this host\n.*MASTER_PORT={port}\n"):
            open_job_store(rank(0, "127.0.0.1", port), 100, answer_s=0.3)
        with pytest.raises(LaunchError, match=rf"a program listens there that is not the job's store\n.*={port}\n"):
            open_job_store(rank(1, "127.0.0.1", port), 5, answer_s=0.3)
    # torch aborts an interpreter that ends while it still tries to connect
    for thread in threading.enumerate():
        if thread.name == stores.MEETING:
            thread.join(60)


@pytest.mark.parametrize("address", ["no-such-host.invalid", "", "1.2.3.999", "a b", "x" * 70, "::g"])
def test_an_address_that_stands_for_nothing_is_told_soon(address):
    with pytest.raises(LaunchError, match=r"stands for no address: .*\n.*MASTER_ADDR"):
        open_job_store(rank(1, address, 29500), 600, resolves_s=0.0)

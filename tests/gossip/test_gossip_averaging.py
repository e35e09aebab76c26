"""Gossip over threads: equal to the dense W @ X, in chunks, with used-again buffers and refusals by name."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from gossip_worker import NUMEL, STEPS, average, mix, start_values
from rounding import UNIT
from test_gossip_graphs import KINDS

from deca_ds.config.schema import GossipConfig
from deca_ds.errors import GossipError
from deca_ds.gossip.buffers import BufferPool
from deca_ds.gossip.gossip import Gossip
from deca_ds.gossip.schedule import build_mixing
from deca_ds.gossip.strategies import WINDOW, begin
from deca_ds.transport.collectives import all_reduce_sum, barrier, gather_json
from deca_ds.transport.local import LocalNetwork, LocalTransport
from deca_ds.transport.transport import BARRIER_TAG, GATHER_TAG, REDUCE_TAG, chunk_tag


def on_all_clients(n: int, body: Callable[[LocalTransport], object], timeout_s: float = 30.0) -> list:
    """body(transport) of every client in a thread of its own; results in client order."""
    network = LocalNetwork(n, timeout_s)
    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(lambda client: body(network.transport(client)), range(n)))


@pytest.mark.parametrize("kind", KINDS)
def test_chunked_gossip_is_the_dense_product(kind: str):
    n = 4
    mixed = torch.stack(on_all_clients(n, lambda transport: average(transport, kind)))
    schedule = build_mixing(GossipConfig(graph=kind), n, seed=4)
    dense = np.stack([start_values(client).numpy().astype(np.float64) for client in range(n)])
    mean, rounding = dense.mean(axis=0), STEPS * 2 * n * UNIT * np.abs(dense).max()
    for t in range(STEPS):
        dense = schedule.matrix(t) @ dense
    np.testing.assert_allclose(mixed.numpy(), dense, rtol=0, atol=rounding)
    np.testing.assert_allclose(mixed.double().mean(dim=0).numpy(), mean, rtol=0, atol=rounding)


def test_terms_are_added_in_ascending_client_order():
    n = 5
    schedule = build_mixing(GossipConfig(graph="complete"), n, seed=0)

    def body(transport: LocalTransport) -> torch.Tensor:
        return mix(Gossip(transport, schedule), 0, start_values(transport.client))

    expected = start_values(0) * schedule.weight(0, 0, 0)
    for j in range(1, n):
        expected.add_(start_values(j), alpha=schedule.weight(0, j, 0))
    for mixed in on_all_clients(n, body):
        assert torch.equal(mixed, expected)


def test_two_runs_are_bit_identical():
    first, second = (on_all_clients(4, lambda transport: average(transport, "erdos_renyi")) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_an_own_weight_of_zero_leaves_the_neighbours_alone_in_the_mean(tmp_path):
    path = tmp_path / "w.txt"
    path.write_text("0 1/2 1/2\n1/2 0 1/2\n1/2 1/2 0\n")
    schedule = build_mixing(GossipConfig(matrix=str(path)), 3, seed=0)
    values = [1.0, 2.0, 4.0]

    def body(transport: LocalTransport) -> list[float]:
        return mix(Gossip(transport, schedule), 0, torch.full((2,), values[transport.client])).tolist()

    assert on_all_clients(3, body) == [[3.0, 3.0], [2.5, 2.5], [1.5, 1.5]]


def test_a_client_without_neighbours_sends_nothing():
    gossip = Gossip(LocalNetwork(3).transport(1), build_mixing(GossipConfig(graph="isolated"), 3, seed=0))
    averaging = begin(gossip, 0)
    assert not averaging.mixes and not list(averaging.settle())
    assert gossip.bytes_sent == 0 and gossip.wait_seconds == 0.0


def parts(gossip: Gossip, numel: int) -> list[slice]:
    return [chunk.part for chunk in gossip.chunks([numel])]


def test_chunks_cover_a_shard_and_follow_chunk_mib():
    schedule = build_mixing(GossipConfig(), 1, seed=0)
    gossip = Gossip(LocalNetwork(1).transport(0), schedule, chunk_mib=1.0)
    assert parts(gossip, 600_000) == [slice(0, 262_144), slice(262_144, 524_288), slice(524_288, 600_000)]
    assert parts(gossip, 0) == []
    assert parts(Gossip(LocalNetwork(1).transport(0), schedule, chunk_mib=1e-9), 2) == [slice(0, 1), slice(1, 2)]


def test_bytes_and_seconds_are_counted():
    schedule = build_mixing(GossipConfig(graph="star"), 3, seed=0)

    def body(transport: LocalTransport) -> tuple[int, bool]:
        gossip = Gossip(transport, schedule)
        mix(gossip, 0, torch.zeros(100))
        return gossip.bytes_sent, gossip.wait_seconds > 0

    assert on_all_clients(3, body) == [(800, True), (400, True), (400, True)]


def test_buffers_are_used_again_and_bounded_by_the_window():
    allocated: list[int] = []
    lock = threading.Lock()

    class CountingPool(BufferPool):
        def take(self, numel: int) -> torch.Tensor:
            free = {id(buffer) for buffer in self.free}
            buffer = super().take(numel)
            if id(buffer) not in free:
                with lock:
                    allocated.append(numel)
            return buffer

    schedule = build_mixing(GossipConfig(graph="ring"), 4, seed=0)

    def body(transport: LocalTransport) -> None:
        gossip = Gossip(transport, schedule, chunk_mib=64 * 4 / 2**20)
        gossip.pool = CountingPool(torch.float32, pinned=False)
        for t in range(20):
            mix(gossip, t, torch.zeros(64 * 6 + 10))
        assert len(gossip.pool.free) <= 2 * WINDOW

    on_all_clients(4, body)
    assert len(allocated) <= 4 * WINDOW * 2


def test_a_smaller_free_buffer_makes_room_for_a_larger():
    pool = BufferPool(torch.float32, pinned=False)
    pool.give_back(torch.empty(4))
    pool.give_back(torch.empty(16))
    assert pool.take(10).numel() == 16
    assert pool.take(10).numel() == 10
    assert pool.free == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_neighbour_that_is_not_finite_is_named(value: float):
    schedule = build_mixing(GossipConfig(graph="ring"), 4, seed=0)

    def body(transport: LocalTransport) -> str:
        x = torch.ones(50)
        if transport.client == 2:
            x[7] = value
        try:
            mix(Gossip(transport, schedule), 3, x)
        except GossipError as error:
            return str(error)
        return ""

    messages = on_all_clients(4, body)
    assert messages[0] == ""
    for client in (1, 2, 3):
        assert "1 of 50 values of client 2 are not finite (averaging 3)" in messages[client]
        assert f"where: client {client}" in messages[client]


def test_large_finite_values_pass():
    schedule = build_mixing(GossipConfig(graph="ring"), 3, seed=0)
    mixed = on_all_clients(3, lambda transport: mix(Gossip(transport, schedule), 0, torch.full((50,), 3e38)))
    assert all(bool(x.isfinite().all()) for x in mixed)


def test_a_silent_neighbour_is_named_with_tag_and_timeout():
    schedule = build_mixing(GossipConfig(graph="ring"), 4, seed=0)
    gossip = Gossip(LocalNetwork(4, timeout_s=0.05).transport(2), schedule)
    with pytest.raises(GossipError) as caught:
        mix(gossip, 1, torch.zeros(3))
    assert f"no message from rank 1 (client 1) within 0.05 s (tag {chunk_tag(1, 0)})" in caught.value.what
    assert "cluster.timeout_s" in caught.value.fix


def test_a_message_of_another_size_is_refused():
    network = LocalNetwork(2)
    network.transport(0).exchange(torch.zeros(4), [1], {}, 9)
    with pytest.raises(GossipError, match=r"from rank 0 \(client 0\) does not fit \(tag 9\).*\(4,\).*\(3,\)"):
        network.transport(1).exchange(torch.zeros(4), [], {0: torch.empty(3)}, 9).wait()


def test_messages_of_one_tag_go_to_receives_in_their_order_whoever_looks_first():
    network = LocalNetwork(2)
    first, second = torch.empty(2), torch.empty(3)
    started = [network.transport(1).exchange(torch.empty(0), [], {0: buffer}, 9) for buffer in (first, second)]
    network.transport(0).exchange(torch.zeros(2), [1], {}, 9)
    assert not started[1].test() and started[0].test()
    network.transport(0).exchange(torch.ones(3), [1], {}, 9)
    assert started[1].test() and (first.tolist(), second.tolist()) == ([0, 0], [1, 1, 1])


def test_misuse_is_refused():
    schedule = build_mixing(GossipConfig(), 2, seed=0)
    with pytest.raises(GossipError, match="for 2 clients, but 3 are connected"):
        Gossip(LocalNetwork(3).transport(0), schedule)
    network = LocalNetwork(2)
    gossip = Gossip(network.transport(0), schedule)
    (chunk,) = gossip.chunks([4])
    for x in (torch.zeros(2, 2), torch.zeros(4, dtype=torch.bfloat16), torch.zeros(8)[::2], torch.zeros(3)):
        with pytest.raises(ValueError, match="flat float32"):
            begin(gossip, 0).send(chunk, "x", x)
    with pytest.raises(AssertionError, match="nobody"):
        begin(gossip, None).send(chunk, "x", torch.zeros(4))
    with pytest.raises(ValueError, match="contiguous"):
        all_reduce_sum(network.transport(0), torch.zeros(6)[::2])


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_sum_barrier_and_gathering_give_every_client_the_same(n: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("deca_ds.transport.collectives.REDUCE_PIECE", 7)

    def body(transport: LocalTransport) -> tuple:
        x = start_values(transport.client)[:40].view(5, 8).clone()
        all_reduce_sum(transport, x)
        barrier(transport)
        gathered = gather_json(transport, [transport.client, None, "é"])
        transport.close()
        return x, gathered

    expected = torch.zeros(5, 8)
    for client in range(n):
        expected += start_values(client)[:40].view(5, 8)
    for x, gathered in on_all_clients(n, body):
        assert torch.equal(x, expected)
        assert gathered == [[client, None, "é"] for client in range(n)]


def test_what_is_no_json_names_its_sender():
    for length, text, fact in ((3, b"{x}", "client 0 sent no valid JSON"), (-1, b"", "client 0 announced -1 bytes")):
        network = LocalNetwork(2)
        sender = network.transport(0)
        sender.exchange(torch.tensor([length]), [1], {}, GATHER_TAG)
        sender.exchange(torch.tensor(list(text), dtype=torch.uint8), [1], {}, GATHER_TAG)
        with pytest.raises(GossipError, match=fact):
            gather_json(network.transport(1), "fine")


def test_tags_fit_mpi_and_tell_chunks_and_averagings_apart():
    tags = {chunk_tag(t, chunk) for t in range(7) for chunk in range(4096)}
    assert len(tags) == 7 * 4096 and min(tags) == 0
    assert max(tags) < min(REDUCE_TAG, GATHER_TAG, BARRIER_TAG)
    assert max(REDUCE_TAG, GATHER_TAG, BARRIER_TAG) <= 32767
    assert chunk_tag(10**9, 10**6) in tags
    assert NUMEL > 4096 // 4  # the shared checks send more than one message per chunk

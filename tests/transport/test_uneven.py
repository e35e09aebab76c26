"""Clients of different sizes average the same values as clients of one size, bit by bit; in threads."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from itertools import accumulate
from typing import Any

import pytest
import torch
from rounding import UNIT
from torch.distributed import HashStore

from deca_ds.config.schema import GossipConfig
from deca_ds.errors import GossipError, MessageError
from deca_ds.gossip import subset
from deca_ds.gossip.averaging import Gossip
from deca_ds.gossip.schedule import build_mixing
from deca_ds.gossip.uneven import UnevenGossip
from deca_ds.launch.launcher import ClientLayout, Launch
from deca_ds.launch.progress import Progress
from deca_ds.launch.store import JobStore
from deca_ds.launch.view import Membership, View
from deca_ds.transport import transport as shared
from deca_ds.transport.edges import probe_edges, save_edges
from deca_ds.transport.intersections import held
from deca_ds.transport.local import LocalNetwork, LocalTransport
from deca_ds.transport.uneven import UnevenTransport, torch_between_ranks

NUMELS = [40, 1, 2, 31, 64]  # parameters of fewer elements than ranks, and such that no size divides
LAYOUTS = [(2, 1, 1), (1, 3, 2), (4, 3, 3), (2, 5, 2)]
STEPS = 3


class Ranks:
    """All ranks of clients of these sizes, a thread each."""

    def __init__(self, sizes: tuple[int, ...], timeout_s: float = 20.0):
        self.layout, self.total = ClientLayout.of(sizes), sum(sizes)
        self.network = LocalNetwork(self.total, timeout_s)
        self._meet = [threading.Barrier(size) for size in sizes]
        self._numbers: dict[int, float] = {}

    def transport(self, rank: int) -> UnevenTransport:
        return UnevenTransport(self.network.transport(rank), self.layout)

    def run(self, body: Callable[[int], Any]) -> list[Any]:
        with ThreadPoolExecutor(self.total) as pool:
            return list(pool.map(body, range(self.total)))

    def client_sum(self, rank: int) -> Callable[[float], float]:
        client = self.layout.client_of(rank)

        def summed(value: float) -> float:
            self._numbers[rank] = value
            self._meet[client].wait(20)
            total = sum(self._numbers[other] for other in self.layout.ranks_of(client))
            self._meet[client].wait(20)
            return total

        return summed

    def shard(self, rank: int, whole: torch.Tensor, numels=NUMELS) -> torch.Tensor:
        client = self.layout.client_of(rank)
        ranges = held(numels, len(self.layout.ranks_of(client)), self.layout.shard_of(rank))
        return torch.cat([whole[0:0], *(whole[a:b] for a, b in ranges)])

    def together(self, client: int, shards: list[torch.Tensor], numels=NUMELS) -> torch.Tensor:
        ranks = self.layout.ranks_of(client)
        whole = torch.full((sum(numels),), float("nan"))
        for shard, rank in enumerate(ranks):
            ranges = held(numels, len(ranks), shard)
            for (a, b), part in zip(ranges, shards[rank].split([b - a for a, b in ranges]), strict=True):
                whole[a:b] = part
        return whole


def averaged(gossip: Gossip, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """STEPS averagings of all tensors, as the trainer does it."""
    tensors = [tensor.clone() for tensor in tensors]
    for t in range(STEPS):
        under_way, message = [], 0
        for chunk in gossip.chunks(len(tensors[0])):
            for tensor in tensors:
                if len(under_way) == gossip.window:
                    into, pending = under_way.pop(0)
                    into.copy_(pending.wait())
                under_way.append((tensor[chunk], gossip.start(t, tensor[chunk], message)))
                message += 1
        gossip.settle(t)
        for into, pending in under_way:
            into.copy_(pending.wait())
    return tensors


def rounding_of(whole: torch.Tensor) -> float:
    """Of averagings, each of which takes a product and a sum for each client, fused or not."""
    return STEPS * 2 * len(whole) * UNIT * float(whole.abs().max())


@pytest.mark.parametrize("sizes", LAYOUTS)
@pytest.mark.parametrize("graph", ["ring", "one_peer_exponential", "star"])
@pytest.mark.parametrize(("travelling", "radius"), [(1, None), (2, None), (1, 5.0)])
def test_averages_are_those_of_clients_of_one_size(sizes, graph, travelling, radius):
    schedule = build_mixing(GossipConfig(graph=graph), len(sizes), seed=4)
    whole = torch.randn(len(sizes), travelling, sum(NUMELS), generator=torch.Generator().manual_seed(0))
    network, ranks = LocalNetwork(len(sizes), 20.0), Ranks(sizes)

    def even(client: int) -> tuple[list[torch.Tensor], int]:
        gossip = Gossip(network.transport(client), schedule, clip_radius=radius)
        return averaged(gossip, list(whole[client])), gossip.bytes_sent

    def uneven(rank: int) -> tuple[list[torch.Tensor], int]:
        client = ranks.layout.client_of(rank)
        gossip = UnevenGossip(
            ranks.transport(rank),
            schedule,
            16 * 4 / 2**20,  # 16 elements a chunk
            clip_radius=radius,
            client_sum=ranks.client_sum(rank),
            numels=lambda: NUMELS,
            messages=travelling,
        )
        return averaged(gossip, [ranks.shard(rank, x) for x in whole[client]]), gossip.bytes_sent

    with ThreadPoolExecutor(len(sizes)) as pool:
        expected = list(pool.map(even, range(len(sizes))))
    got = ranks.run(uneven)
    for client, (tensors, sent) in enumerate(expected):
        for place, tensor in enumerate(tensors):
            mixed = ranks.together(client, [shards[place] for shards, _ in got])
            torch.testing.assert_close(mixed, tensor, rtol=0, atol=rounding_of(whole))
        assert sum(got[rank][1] for rank in ranks.layout.ranks_of(client)) == sent


class Surviving(LocalTransport):
    """Agreement number `at` finds client `dead` gone: all messages are sent again in a new network."""

    may_lose_clients = True

    def __init__(self, networks: list[LocalNetwork], rank: int, clients: int, dead: int, at: int):
        super().__init__(networks[0], rank)
        self.membership = Membership(View.of_all(clients))
        self._next, self._dead, self._agreements = networks[1], dead, at

    def together(self, work: Callable[[], Any], *, last: bool = False) -> Any:
        self._agreements -= 1
        if self._agreements == 0:
            self._network, self._epoch = self._next, self._epoch + 1
            left = tuple(j for j in self.members.clients if j != self._dead)
            self.membership.change(View(1, left, self.members.total))
        return work()


@pytest.mark.parametrize("sizes", LAYOUTS)
@pytest.mark.parametrize("travelling", [1, 2])
def test_an_averaging_is_done_again_without_a_client_that_dies_amid_it(sizes, travelling):
    """What has been sent of the second averaging is lost; then the scores of the mean model are without it, too."""
    ranks, dead, numel = Ranks(sizes), 1, sum(NUMELS)
    networks = [ranks.network, LocalNetwork(ranks.total, 20.0)]
    schedule = build_mixing(GossipConfig(graph="complete"), len(sizes), seed=4)
    whole = torch.randn(len(sizes), travelling, numel, generator=torch.Generator().manual_seed(0))

    def body(rank: int) -> tuple[list[torch.Tensor], torch.Tensor]:
        inner = Surviving(networks, rank, len(sizes), dead, at=2)
        transport = UnevenTransport(inner, ranks.layout)
        numels = {"numels": lambda: NUMELS, "messages": travelling}
        gossip = UnevenGossip(transport, schedule, 16 * 4 / 2**20, client_sum=ranks.client_sum(rank), **numels)

        def changed(before: View, view: View) -> None:
            if transport.client == dead:
                raise MessageError("dead")
            gossip.average_by(subset.without(schedule, view.missing))

        inner.membership.subscribe(changed)
        own = [ranks.shard(rank, x) for x in whole[transport.client]]
        with suppress(MessageError):
            own = averaged(gossip, own)
        summed = ranks.shard(rank, whole[transport.client, 0], [numel])
        if transport.client != dead:
            assert transport.epoch == 1
            summed = sum_slice(transport, summed, numel)
        return own, summed

    results = ranks.run(body)
    expected = whole
    for matrix in [schedule.matrices[0], *[subset.without(schedule, [dead]).matrices[0]] * (STEPS - 1)]:
        expected = torch.einsum("ij,jkn->ikn", torch.tensor(matrix, dtype=torch.float32), expected)
    for client in (0, 2):
        for place in range(travelling):
            mixed = ranks.together(client, [shards[place] for shards, _ in results])
            torch.testing.assert_close(mixed, expected[client, place], rtol=0, atol=rounding_of(whole))
        summed = ranks.together(client, [summed for _, summed in results], [numel])
        assert torch.equal(summed, whole[0, 0] + whole[2, 0])


def sum_slice(transport: UnevenTransport, values: torch.Tensor, numel: int) -> torch.Tensor:
    """Of one parameter, put together from pieces."""
    return torch.cat(
        [each for *_, each in transport.sum_slices([numel], [len(values)], lambda _, part: values[part].clone())]
    )


@pytest.mark.parametrize("sizes", LAYOUTS)
def test_collectives(sizes, monkeypatch):
    monkeypatch.setattr(shared, "REDUCE_PIECE", 20)
    ranks, numel = Ranks(sizes), 101
    whole = torch.randn(len(sizes), numel, generator=torch.Generator().manual_seed(1))

    def body(rank: int):
        transport = ranks.transport(rank)
        client = transport.client
        total, slices = whole[client].clone(), ranks.shard(rank, whole[client], [numel])
        transport.all_reduce_sum(total)
        slices = sum_slice(transport, slices, numel)
        gathered = transport.gather_json({"client": client})
        transport.barrier()
        return total, slices, gathered

    expected = torch.zeros(numel)
    for row in whole:
        expected += row
    results = ranks.run(body)
    for total, _, gathered in results:
        assert torch.equal(total, expected)
        assert gathered == [{"client": client} for client in range(len(sizes))]
    for client in range(len(sizes)):
        assert torch.equal(ranks.together(client, [slices for _, slices, _ in results], [numel]), expected)


def test_who_speaks_for_all_is_heard_by_every_leader():
    """What ranks of one client say may differ: a leader hears the leaders."""
    ranks = Ranks((2, 1, 3))
    heard = ranks.run(lambda rank: ranks.transport(rank).gather_json(rank))
    leaders = [ranks.layout.leader_of(client) for client in range(3)]
    assert all(heard[leader] == leaders for leader in leaders)


@pytest.mark.parametrize("sizes", LAYOUTS)
def test_every_pair_of_ranks_of_an_edge_is_timed(sizes, tmp_path):
    ranks, store = Ranks(sizes), HashStore()
    mixing = build_mixing(GossipConfig(graph="complete"), len(sizes), seed=0)

    def body(rank: int):
        job, launch = JobStore(store, None, timedelta(seconds=20)), Launch("python", rank, ranks.total, 0, None)
        transport = ranks.transport(rank)
        return probe_edges(transport, mixing.neighbours(transport.client), launch, ranks.layout, job)

    every = ranks.run(body)
    assert all(edges == every[0] for edges in every)
    numel = 60 * 7 * 2  # which all sizes divide
    offsets = [0, *accumulate(sizes)]
    for edge in every[0]:
        i, j = edge["clients"]
        pairs = [
            [offsets[i] + s, offsets[j] + r]
            for s in range(sizes[i])
            for r in range(sizes[j])
            if max(numel * s // sizes[i], numel * r // sizes[j])
            < min(numel * (s + 1) // sizes[i], numel * (r + 1) // sizes[j])
        ]
        assert sorted(shard["ranks"] for shard in edge["shards"]) == pairs
    assert save_edges(every[0], tmp_path).startswith("slowest of 3 edges")
    assert json.loads((tmp_path / "edges.json").read_text()) == every[0]


def test_a_rank_that_does_not_answer_is_named_with_its_client():
    ranks = Ranks((2, 1), timeout_s=0.1)
    transport = ranks.transport(1)
    transport.progress = progress = Progress()
    with pytest.raises(MessageError, match=r"no message from rank 2 \(client 1\)") as caught:
        transport.exchange(torch.zeros(1), [], {1: torch.empty(1)}, 7).wait()
    assert caught.value.where == "rank 1 (client 0)" and "rank 2 (client 1)" in caught.value.fix
    transport.ranks.progress.wait_for(2)
    assert progress.awaits == 1, "heartbeats name clients"


def test_a_rank_that_does_not_join_ends_the_wait():
    store = HashStore()
    with pytest.raises(GossipError, match=r"not all 3 ranks joined gossip within 0\.3 s"):
        torch_between_ranks(store, Launch("python", 0, 3, 0, None), 0.3)

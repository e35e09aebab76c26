"""Who exchanges what with whom, and that clients of different sizes average what clients of one size do; in threads."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
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
from deca_ds.gossip.averaging import Mean
from deca_ds.gossip.clip import Clip
from deca_ds.gossip.codec import CODECS
from deca_ds.gossip.gossip import Gossip
from deca_ds.gossip.schedule import build_mixing
from deca_ds.gossip.strategies import begin
from deca_ds.launch.launcher import ClientLayout, Launch
from deca_ds.launch.progress import Progress
from deca_ds.launch.store import JobStore
from deca_ds.launch.view import View
from deca_ds.transport import collectives
from deca_ds.transport.chunks import exchange_chunk
from deca_ds.transport.collectives import all_reduce_sum, barrier, gather_json, sum_slices
from deca_ds.transport.commit import Commit
from deca_ds.transport.edges import probe_edges, save_edges
from deca_ds.transport.gloo import GlooTransport
from deca_ds.transport.intersections import held
from deca_ds.transport.local import LocalNetwork, LocalTransport
from deca_ds.transport.routes import Routes
from deca_ds.transport.transport import Endpoint

NUMELS = [40, 1, 2, 31, 64]  # parameters of fewer elements than ranks, and such that no size divides
LAYOUTS = [(2, 1, 1), (1, 3, 2), (4, 3, 3), (2, 5, 2)]
STEPS = 3


class Ranks:
    """All ranks of clients of these sizes, a thread each."""

    def __init__(self, sizes: tuple[int, ...], timeout_s: float = 100.0):
        self.layout, self.total = ClientLayout.of(sizes), sum(sizes)
        self.network = LocalNetwork(sizes, timeout_s)
        self._meet = [threading.Barrier(size) for size in sizes]
        self._numbers: dict[int, float] = {}

    def transport(self, rank: int) -> LocalTransport:
        return self.network.transport(rank)

    def run(self, body: Callable[[int], Any]) -> list[Any]:
        with ThreadPoolExecutor(self.total) as pool:
            return list(pool.map(body, range(self.total)))

    def client_sum(self, rank: int) -> Callable[[float], float]:
        client = self.layout.client_of(rank)

        def summed(value: float) -> float:
            self._numbers[rank] = value
            self._meet[client].wait(100)
            total = sum(self._numbers[other] for other in self.layout.ranks_of(client))
            self._meet[client].wait(100)
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


@pytest.mark.parametrize("sizes", [*LAYOUTS, (1, 1, 1), (3, 3)])
def test_each_rank_hears_what_is_alike_from_one_rank_of_every_other_client_which_knows_it(sizes):
    layout = ClientLayout.of(sizes)
    ranks = [Routes(layout, rank) for rank in range(sum(sizes))]
    for rank, routes in enumerate(ranks):
        for j in set(range(len(sizes))) - {layout.client_of(rank)}:
            source = routes.source(j)
            assert layout.client_of(source) == j and source in routes.peers([j])
            hears = [other for other in layout.ranks_of(j) if rank in ranks[other].hearers(layout.client_of(rank))]
            assert hears == [source]


@pytest.mark.parametrize("sizes", [*LAYOUTS, (1, 1, 1), (3, 3)])
def test_slices_of_a_parameter_are_shared_element_by_element(sizes):
    """Whatever its number of elements, what a rank shares with all ranks of another client is its slice, once."""
    layout = ClientLayout.of(sizes)
    for numel in (1, 2, 7, 60):
        for rank in range(sum(sizes)):
            mine = elements_of(layout, rank, numel)
            for j in set(range(len(sizes))) - {layout.client_of(rank)}:
                shares = Routes(layout, rank).shares(numel, j)
                found = [mine[part] for _, part in shares]
                assert [x for part in found for x in part] == mine
                for (other, _), part in zip(shares, found, strict=True):
                    assert set(part) <= set(elements_of(layout, other, numel))
                    assert (rank, part) in [
                        (back, elements_of(layout, other, numel)[there])
                        for back, there in Routes(layout, other).shares(numel, layout.client_of(rank))
                    ]


def elements_of(layout: ClientLayout, rank: int, numel: int) -> list[int]:
    ranks = len(layout.ranks_of(layout.client_of(rank)))
    return [x for a, b in held([numel], ranks, layout.shard_of(rank)) for x in range(a, b)]


def test_between_clients_of_one_size_a_chunk_is_a_slice_of_the_shard_for_the_rank_of_the_same_index():
    routes = Routes(ClientLayout(3, 2), 3)
    chunks = routes.chunks([7, 1, 8], 3)  # 3 + 0 + 4 elements
    assert [chunk.part for chunk in chunks] == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert [routes.meets(chunks[2], j) for j in (0, 2)] == [[(1, [(0, 1)])], [(5, [(0, 1)])]]
    assert (routes.peers([0, 2]), routes.source(2), [*routes.hearers(2)], routes.edge(0)) == ([1, 5], 5, [5], [1])


def test_ranks_that_hold_the_same_are_sent_one_message_with_one_checksum(monkeypatch):
    """Rank 0 holds all of its client's chunk; the ranks of clients 1 and 2 hold a half each, two and two the same."""
    ranks, started = Ranks((1, 2, 2)), []
    transport = ranks.transport(0)
    (chunk,) = transport.routes.chunks([6], 6)
    exchange = transport.exchange
    monkeypatch.setattr(transport, "exchange", lambda *message: started.append(message) or exchange(*message))
    buffers = {j: torch.empty(6) for j in (1, 2)}
    exchange_chunk(transport, chunk, torch.arange(6.0), [1, 2], buffers, 7)
    assert [(send.tolist(), to) for send, to, _, _ in started] == [([0, 1, 2], [1, 3]), ([3, 4, 5], [2, 4])]
    assert [sorted(receives) for _, _, receives, _ in started] == [[1, 2, 3, 4], []]


def averaged(gossip: Gossip, tensors: list[torch.Tensor], numels=NUMELS) -> list[torch.Tensor]:
    """STEPS averagings of all tensors, as the trainer does it."""
    tensors = [tensor.clone() for tensor in tensors]

    def take(means: Iterable[Mean]) -> None:
        for chunk, name, values in means:
            tensors[int(name)][chunk.part] = values

    for t in range(STEPS):
        averaging = begin(gossip, t)
        for chunk in gossip.chunks(numels):
            for name, tensor in enumerate(tensors):
                take(averaging.send(chunk, str(name), tensor[chunk.part]))
        take(averaging.settle())
    return tensors


def rounding_of(whole: torch.Tensor) -> float:
    """Of averagings, each of which takes a product and a sum for each client, fused or not."""
    return STEPS * 2 * len(whole) * UNIT * float(whole.abs().max())


@pytest.mark.parametrize("sizes", LAYOUTS)
@pytest.mark.parametrize("graph", ["ring", "one_peer_exponential", "star"])
@pytest.mark.parametrize(
    ("travelling", "radius", "wire"),
    [(1, None, "float32"), (2, None, "float32"), (1, 5.0, "float32"), (2, None, "bfloat16")],
)
def test_averages_are_those_of_clients_of_one_size(sizes, graph, travelling, radius, wire):
    schedule = build_mixing(GossipConfig(graph=graph), len(sizes), seed=4)
    whole = torch.randn(len(sizes), travelling, sum(NUMELS), generator=torch.Generator().manual_seed(0))
    network, ranks = LocalNetwork(len(sizes), 100.0), Ranks(sizes)

    def even(client: int) -> tuple[list[torch.Tensor], int]:
        clip = None if radius is None else Clip(radius)
        gossip = Gossip(network.transport(client), schedule, codec=CODECS[wire], clip=clip)
        return averaged(gossip, list(whole[client])), gossip.bytes_sent

    def of_different_sizes(rank: int) -> tuple[list[torch.Tensor], int]:
        client = ranks.layout.client_of(rank)
        gossip = Gossip(
            ranks.transport(rank),
            schedule,
            16 * 4 / 2**20,  # 16 elements a chunk
            codec=CODECS[wire],
            clip=None if radius is None else Clip(radius, ranks.client_sum(rank)),
        )
        return averaged(gossip, [ranks.shard(rank, x) for x in whole[client]]), gossip.bytes_sent

    with ThreadPoolExecutor(len(sizes)) as pool:
        expected = list(pool.map(even, range(len(sizes))))
    got = ranks.run(of_different_sizes)
    for client, (tensors, sent) in enumerate(expected):
        for place, tensor in enumerate(tensors):
            mixed = ranks.together(client, [shards[place] for shards, _ in got])
            torch.testing.assert_close(mixed, tensor, rtol=0, atol=rounding_of(whole))
        assert sum(got[rank][1] for rank in ranks.layout.ranks_of(client)) == sent


class Without(Commit):
    """Agreement number `at` finds client `dead` gone: all messages are sent again in a new network."""

    may_repeat = True

    def __init__(self, transport: LocalTransport, new: LocalNetwork, dead: int, at: int):
        self._transport, self._new, self._dead, self._left = transport, new, dead, at

    def run(self, work: Callable[[], Any], *, last: bool = False) -> Any:
        self._left -= 1
        if self._left == 0:
            transport = self._transport
            transport.network, transport.epoch = self._new, transport.epoch + 1
            left = tuple(j for j in transport.members.clients if j != self._dead)
            transport.membership.change(View(1, left, transport.clients))
        return work()


@pytest.mark.parametrize("sizes", LAYOUTS)
@pytest.mark.parametrize("travelling", [1, 2])
def test_an_averaging_is_repeated_without_a_client_that_dies_during_it(sizes, travelling):
    """What has been sent of the second averaging is lost; then the scores of the mean model are without it, too."""
    ranks, dead, numel = Ranks(sizes), 1, sum(NUMELS)
    new = LocalNetwork(sizes, 100.0)
    schedule = build_mixing(GossipConfig(graph="complete"), len(sizes), seed=4)
    whole = torch.randn(len(sizes), travelling, numel, generator=torch.Generator().manual_seed(0))

    def body(rank: int) -> tuple[list[torch.Tensor], torch.Tensor]:
        transport = ranks.transport(rank)

        def changed(before: View, view: View) -> None:
            if transport.client == dead:
                raise MessageError("dead")
            gossip.average_by(subset.without(schedule, view.missing))

        transport.membership.subscribe(changed)
        commit = Without(transport, new, dead, 2)
        gossip = Gossip(transport, schedule, 16 * 4 / 2**20, commit=commit, client_sum=ranks.client_sum(rank))
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


def sum_slice(transport: LocalTransport, values: torch.Tensor, numel: int) -> torch.Tensor:
    """Of one parameter, put together from pieces."""
    return torch.cat(
        [each for *_, each in sum_slices(transport, [numel], [len(values)], lambda _, part: values[part].clone())]
    )


@pytest.mark.parametrize("sizes", LAYOUTS)
def test_sums_gathering_and_barrier_work_among_clients_of_any_sizes(sizes, monkeypatch):
    monkeypatch.setattr(collectives, "REDUCE_PIECE", 20)
    ranks, numel = Ranks(sizes), 101
    whole = torch.randn(len(sizes), numel, generator=torch.Generator().manual_seed(1))

    def body(rank: int):
        transport = ranks.transport(rank)
        client = transport.client
        total, slices = whole[client].clone(), ranks.shard(rank, whole[client], [numel])
        all_reduce_sum(transport, total)
        slices = sum_slice(transport, slices, numel)
        gathered = gather_json(transport, {"client": client})
        barrier(transport)
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


def test_every_leader_hears_what_the_leaders_say():
    """What ranks of one client say may differ: a leader hears the leaders."""
    ranks = Ranks((2, 1, 3))
    heard = ranks.run(lambda rank: gather_json(ranks.transport(rank), rank))
    leaders = [ranks.layout.leader_of(client) for client in range(3)]
    assert all(heard[leader] == leaders for leader in leaders)


@pytest.mark.parametrize("sizes", LAYOUTS)
def test_every_pair_of_ranks_of_an_edge_is_timed(sizes, tmp_path):
    ranks, store = Ranks(sizes), HashStore()
    mixing = build_mixing(GossipConfig(graph="complete"), len(sizes), seed=0)

    def body(rank: int):
        job, launch = JobStore(store, None, timedelta(seconds=100)), Launch("python", rank, ranks.total, 0, None)
        transport = ranks.transport(rank)
        return probe_edges(transport, mixing.neighbours(transport.client), launch, job)

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
        transport.exchange(torch.zeros(1), [], {2: torch.empty(1)}, 7).wait()
    assert caught.value.where == "rank 1 (client 0)" and "rank 2 (client 1)" in caught.value.fix
    assert progress.awaits == 1, "heartbeats name clients"


def test_a_rank_that_does_not_join_ends_the_wait():
    with pytest.raises(GossipError, match=r"not all 3 ranks joined the gossip group within 0\.3 s"):
        GlooTransport(HashStore(), Endpoint(ClientLayout.of((2, 1)), 0, 0.3))

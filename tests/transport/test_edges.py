"""The edge test: which edges, what it says of them, and how a broken one is named."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
from torch.distributed import HashStore

from deca_ds.config.schema import GossipConfig
from deca_ds.errors import GossipError
from deca_ds.gossip.schedule import build_mixing
from deca_ds.launch.launcher import Launch
from deca_ds.launch.store import JobStore
from deca_ds.transport.edges import probe_edges, save_edges
from deca_ds.transport.local import LocalNetwork
from deca_ds.transport.transport import PROBE_TAG


def probe(graph: str, clients: int, ranks: int) -> list[list[dict]]:
    """`probe_edges` of all ranks, in threads."""
    network, store = LocalNetwork([ranks] * clients, 100.0), HashStore()
    mixing = build_mixing(GossipConfig(graph=graph), clients, seed=0)

    def body(rank: int) -> list[dict]:
        transport, launch = network.transport(rank), Launch("python", rank, clients * ranks, 0, None)
        job = JobStore(store, None, timedelta(seconds=100))
        return probe_edges(transport, mixing.neighbours(transport.client), launch, job)

    with ThreadPoolExecutor(clients * ranks) as pool:
        return list(pool.map(body, range(clients * ranks)))


@pytest.mark.parametrize(("graph", "clients"), [("ring", 5), ("one_peer_exponential", 4), ("complete", 4), ("star", 4)])
def test_every_edge_of_any_matrix_is_timed_once_on_every_shard(graph, clients, tmp_path):
    every = probe(graph, clients, ranks=2)
    assert all(edges == every[0] for edges in every)
    mixing = build_mixing(GossipConfig(graph=graph), clients, seed=0)
    expected = sorted({(i, j) for i in range(clients) for j in mixing.neighbours(i) if i < j})
    assert [tuple(edge["clients"]) for edge in every[0]] == expected
    for edge in every[0]:
        assert len(edge["hosts"]) == len(edge["shards"]) == 2
        assert all(shard["round_trip_ms"] > 0 and shard["mb_per_s"] > 0 for shard in edge["shards"])
    every[0][-1]["shards"][1]["mb_per_s"] = 0.01
    line = save_edges(every[0], tmp_path)
    i, j = expected[-1]
    assert f"slowest of {len(expected)} edges: client {i} on" in line and f"client {j} on" in line
    assert json.loads((tmp_path / "edges.json").read_text()) == every[0]


def test_the_slowest_edge_is_told_in_numbers_that_can_be_read(tmp_path):
    edge = {"clients": [0, 1], "hosts": ["n0", "n1"], "shards": [{"round_trip_ms": 0.5, "mb_per_s": 4321.4}]}
    line = "slowest of 1 edge: client 0 on n0 - client 1 on n1, round trip 0.50 ms, 4,321 MB/s"
    assert save_edges([edge], tmp_path) == line


def test_isolated_clients_have_no_edges():
    assert probe("isolated", 2, ranks=1) == [[], []]


@pytest.mark.parametrize("what", ["nothing", "another message"])
def test_an_edge_that_does_not_carry_messages_is_named_with_both_ends(what):
    network, store = LocalNetwork(2, 0.2), HashStore()
    store.set("edges/hosts/1/1", json.dumps("far"))
    if what == "another message":
        for _ in range(2):
            network.transport(1).exchange(torch.zeros(8, dtype=torch.uint8), [0], {}, PROBE_TAG)
    launch, job = Launch("python", 0, 2, 0, None), JobStore(store, None, timedelta(seconds=100))
    with pytest.raises(GossipError) as caught:
        probe_edges(network.transport(0), [1], launch, job)
    assert "edge between client 0 (rank 0 on" in str(caught.value) and "client 1 (rank 1 on far)" in str(caught.value)

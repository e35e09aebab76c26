"""MixingSchedule: every key of GossipConfig, neighbours, exact averaging and the dry-run line."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gossip_graphs import KINDS

from deca_ds.config.schema import GossipConfig
from deca_ds.errors import GossipError
from deca_ds.gossip.schedule import MixingSchedule, build_mixing


@given(
    kind=st.sampled_from([*KINDS, "base"]),
    rule=st.sampled_from(["metropolis", "max_degree", "lazy_metropolis"]),
    n=st.sampled_from([1, 2, 4, 8, 16]),
    t=st.integers(0, 40),
)
@settings(max_examples=80)
def test_neighbours_agree_on_who_sends_and_the_mean_is_kept(kind: str, rule: str, n: int, t: int):
    schedule = build_mixing(GossipConfig(graph=kind, weights=rule), n, seed=1)
    matrix = schedule.matrix(t)
    for i in range(n):
        assert schedule.sources(i, t) == sorted(schedule.sources(i, t))
        assert i not in schedule.sources(i, t)
        for j in schedule.sources(i, t):
            assert i in schedule.destinations(j, t)
            assert schedule.weight(i, j, t) == matrix[i, j] > 0
    x = np.random.default_rng(t).normal(size=(n, 3))
    np.testing.assert_allclose((matrix @ x).mean(axis=0), x.mean(axis=0), atol=1e-12)


@pytest.mark.parametrize("n", [2, 4, 8, 32])
@pytest.mark.parametrize("start", [0, 1, 5])
def test_one_peer_exponential_averages_exactly_in_one_period(n: int, start: int):
    schedule = build_mixing(GossipConfig(graph="one_peer_exponential"), n, seed=0)
    x = np.random.default_rng(n).normal(size=(n, 5))
    mixed = x
    for t in range(start, start + schedule.period):
        assert schedule.max_sources == 1
        mixed = schedule.matrix(t) @ mixed
    np.testing.assert_allclose(mixed, np.broadcast_to(x.mean(axis=0), x.shape), atol=1e-12)


def test_one_client_mixes_with_nobody_whatever_the_graph():
    for kind in [*KINDS, "base", "edge_list"]:
        np.testing.assert_array_equal(build_mixing(GossipConfig(graph=kind), 1, seed=0).matrix(7), [[1.0]])


def test_the_schedule_is_the_same_from_the_same_seed_and_read_only():
    config = GossipConfig(graph="erdos_renyi", edge_probability=0.4)
    a, b, c = (build_mixing(config, 10, seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(a.matrix(0), b.matrix(0))
    assert not np.array_equal(a.matrix(0), c.matrix(0))
    with pytest.raises(ValueError, match="read-only"):
        a.matrix(0)[0, 0] = 1.0


def test_edge_probability_one_is_the_complete_graph():
    dense = build_mixing(GossipConfig(graph="erdos_renyi", edge_probability=1.0), 6, seed=0)
    np.testing.assert_allclose(dense.matrix(0), np.full((6, 6), 1 / 6))


def test_a_matrix_replaces_graph_and_weights(tmp_path):
    path = tmp_path / "w.csv"
    path.write_text("0.5,0.5,0\n0,0.5,0.5\n0.5,0,0.5\n")
    schedule = build_mixing(GossipConfig(graph="hypercube", weights="max_degree", matrix=str(path)), 3, seed=0)
    assert schedule.sources(0, 0) == [1] and schedule.destinations(0, 0) == [2]
    assert str(path) in schedule.summary()


def test_edges_file_is_used_and_refused_where_it_would_be_ignored(tmp_path):
    path = tmp_path / "edges"
    path.write_text("0 1\n1 2\n")
    assert build_mixing(GossipConfig(graph="edge_list", edges=str(path)), 3, seed=0).sources(1, 0) == [0, 2]
    with pytest.raises(GossipError) as caught:
        build_mixing(GossipConfig(graph="ring", edges=str(path)), 3, seed=0)
    assert caught.value.where == f"gossip.edges={path}" and "ring" in caught.value.what


@pytest.mark.parametrize(
    ("change", "clients", "key"),
    [
        ({"graph": "ring", "weights": "uniform"}, 4, "gossip.weights"),
        ({"graph": "circle"}, 4, "gossip.graph"),
        ({}, 0, "cluster.clients"),
    ],
)
def test_a_wrong_value_names_its_key(change: dict, clients: int, key: str):
    with pytest.raises(GossipError) as caught:
        build_mixing(dataclasses.replace(GossipConfig(), **change), clients, seed=0)
    assert caught.value.where == key and caught.value.fix


def test_summary_says_what_a_dry_run_needs():
    ring = build_mixing(GossipConfig(graph="ring"), 8, seed=0)
    assert ring.summary() == (
        "ring (metropolis) on 8 clients: at most 2 neighbours a client, the block is sent 16 times per averaging, "
        "spectral gap 0.1953"
    )
    assert (
        "period 3: at most 1 neighbour a client"
        in build_mixing(GossipConfig(graph="one_peer_exponential"), 8, seed=0).summary()
    )


def test_one_client_has_no_neighbours_to_be_told_of():
    assert build_mixing(GossipConfig(), 1, seed=0).summary() == "base (degree 1) on 1 client"


def test_a_schedule_refuses_a_matrix_that_loses_the_mean():
    with pytest.raises(GossipError, match="column 0"):
        MixingSchedule("bad", 2, (np.array([[1.0, 0.0], [0.5, 0.5]]),))

"""Graphs: shape, neighbours, connectedness, and refusals that name the key."""

from __future__ import annotations

from typing import get_args, get_type_hints

import networkx as nx
import pytest

from deca_ds.config.schema import GossipConfig
from deca_ds.errors import GossipError
from deca_ds.gossip.graphs import build_graphs

KINDS = [kind for kind in get_args(get_type_hints(GossipConfig)["graph"]) if kind not in ("edge_list", "base")]


def neighbours(graph: nx.DiGraph, i: int) -> set[int]:
    return set(graph.predecessors(i))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 4, 8, 16])
def test_every_graph_is_connected_over_a_period_and_has_all_clients(kind: str, n: int):
    period = build_graphs(kind, n, probability=0.6, seed=3)
    union = nx.compose_all(period)
    assert all(sorted(graph) == list(range(n)) for graph in period)
    assert nx.number_of_selfloops(union) == 0
    assert nx.is_strongly_connected(union) == (kind != "isolated" or n == 1)


def test_neighbours_are_the_textbook_ones():
    assert neighbours(build_graphs("ring", 5)[0], 0) == {1, 4}
    assert neighbours(build_graphs("complete", 4)[0], 2) == {0, 1, 3}
    assert neighbours(build_graphs("star", 5)[0], 0) == {1, 2, 3, 4}
    assert neighbours(build_graphs("star", 5)[0], 3) == {0}
    assert neighbours(build_graphs("torus", 12)[0], 0) == {1, 3, 4, 8}  # 3 x 4
    assert neighbours(build_graphs("hypercube", 8)[0], 5) == {4, 7, 1}
    assert neighbours(build_graphs("bipartite", 6)[0], 0) == {3, 4, 5}
    assert neighbours(build_graphs("bipartite", 5)[0], 4) == {0, 1, 2}
    assert neighbours(build_graphs("exponential", 6)[0], 0) == {5, 4, 2}
    assert neighbours(build_graphs("isolated", 3)[0], 1) == set()


@pytest.mark.parametrize(("n", "period"), [(1, 1), (2, 1), (3, 2), (5, 3), (8, 3), (9, 4)])
def test_one_peer_exponential_has_a_period_of_log2_n(n: int, period: int):
    graphs = build_graphs("one_peer_exponential", n)
    assert len(graphs) == period
    if n > 1:
        assert [neighbours(graph, 0) for graph in graphs] == [{-(2**k) % n} for k in range(period)]


@pytest.mark.parametrize(("n", "period"), [(2, 2), (3, 4), (8, 6), (9, 8), (20, 10)])
def test_random_pairs_leave_nobody_out_but_one_of_an_odd_number(n: int, period: int):
    graphs = build_graphs("random_pairs", n, seed=5)
    assert len(graphs) == period
    for graph in graphs:
        assert sorted(degree for _, degree in graph.in_degree()) == [0] * (n % 2) + [1] * (n - n % 2)
        assert all(graph.has_edge(b, a) for a, b in graph.edges)
    again, other = (build_graphs("random_pairs", n, seed=seed) for seed in (5, 6))
    assert [set(graph.edges) for graph in graphs] == [set(graph.edges) for graph in again]
    assert n == 2 or [set(graph.edges) for graph in graphs] != [set(graph.edges) for graph in other]


def test_random_graph_depends_on_the_seed_alone():
    edges = [sorted(build_graphs("erdos_renyi", 12, probability=0.3, seed=seed)[0].edges) for seed in (1, 1, 2)]
    assert edges[0] == edges[1] != edges[2]


@pytest.mark.parametrize(
    ("kind", "n", "arguments", "key", "fact"),
    [
        ("torus", 7, {}, "gossip.graph", "7 is prime"),
        ("hypercube", 6, {}, "gossip.graph", "not 6"),
        ("erdos_renyi", 4, {"probability": 0.0}, "gossip.edge_probability", "0.0"),
        ("erdos_renyi", 4, {"probability": 1.5}, "gossip.edge_probability", "1.5"),
        ("erdos_renyi", 40, {"probability": 0.001}, "gossip.edge_probability", "1000 random graphs"),
        ("edge_list", 4, {}, "gossip.edges", "needs a file"),
        ("edge_list", 4, {"edges": "/no/such/file"}, "gossip.edges=/no/such/file", "cannot read"),
        ("rign", 4, {}, "gossip.graph", "'rign'"),
    ],
)
def test_a_graph_that_does_not_fit_names_its_key(kind: str, n: int, arguments: dict, key: str, fact: str):
    with pytest.raises(GossipError) as caught:
        build_graphs(kind, n, **arguments)
    assert caught.value.where == key
    assert fact in caught.value.what
    assert caught.value.fix


def test_edge_list_is_read_with_comments_and_commas(tmp_path):
    path = tmp_path / "edges.txt"
    path.write_text("# a path\n0 1\n\n1,2  # the middle\n3 2\n")
    (graph,) = build_graphs("edge_list", 4, edges=str(path))
    assert neighbours(graph, 2) == {1, 3}
    assert neighbours(graph, 1) == {0, 2}


@pytest.mark.parametrize(
    ("text", "where", "fact"),
    [
        ("0 1\n1 x\n", ":2", "'1 x'"),
        ("0 1 2\n", ":1", "two client numbers"),
        ("0 1\n\n2 4\n", ":3", "no client 4"),
        ("0 1\n-1 2\n", ":2", "no client -1"),
        ("1 1\n", ":1", "joined to itself"),
        ("0 1\n2 3\n", "edges.txt", "no path from client 0 to clients [2, 3]"),
        ("0 1\n1 2\n", "edges.txt", "no path from client 0 to clients [3]"),
    ],
)
def test_a_bad_edge_list_names_file_and_line(tmp_path, text: str, where: str, fact: str):
    path = tmp_path / "edges.txt"
    path.write_text(text)
    with pytest.raises(GossipError) as caught:
        build_graphs("edge_list", 4, edges=str(path))
    assert caught.value.where.endswith(where) and str(path) in caught.value.where
    assert fact in caught.value.what

"""Mixing matrices: rules, known spectral gaps, files and their errors."""

from __future__ import annotations

import math

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deca_ds.config.yaml_text import choices
from deca_ds.errors import GossipError
from deca_ds.gossip import weights
from deca_ds.gossip.graphs import build_graphs

RULES = choices("gossip.weights")


def matrix_of(kind: str, n: int, rule: str = "metropolis") -> np.ndarray:
    (graph,) = build_graphs(kind, n)
    return weights.weigh(graph, rule)


@st.composite
def connected_graphs(draw) -> nx.DiGraph:
    """A random spanning tree and some more edges."""
    n = draw(st.integers(2, 12))
    graph = nx.Graph((i, draw(st.integers(0, i - 1))) for i in range(1, n))
    clients = st.integers(0, n - 1)
    graph.add_edges_from((a, b) for a, b in draw(st.lists(st.tuples(clients, clients), max_size=20)) if a != b)
    return graph.to_directed()


@given(graph=connected_graphs(), rule=st.sampled_from(RULES))
@settings(max_examples=60)
def test_every_rule_is_symmetric_doubly_stochastic_and_averages(graph: nx.DiGraph, rule: str):
    n = len(graph)
    matrix = weights.weigh(graph, rule)
    weights.validate(matrix, n)
    np.testing.assert_array_equal(matrix, matrix.T)
    np.testing.assert_allclose(matrix.sum(axis=0), 1.0, atol=1e-12)
    assert {(j, i) for i, j in zip(*np.nonzero(matrix), strict=True) if i != j} == set(graph.edges)
    assert 0.0 < weights.spectral_gap([matrix]) <= 1.0
    np.testing.assert_allclose(1.0 - weights.spectral_gap([matrix]), weights.second_eigenvalue(matrix), atol=1e-7)


@given(graph=connected_graphs(), data=st.data())
@settings(max_examples=30)
def test_a_broken_row_is_named_with_its_sum(graph: nx.DiGraph, data: st.DataObject):
    n = len(graph)
    row = data.draw(st.integers(0, n - 1))
    matrix = weights.weigh(graph, "metropolis")
    matrix[row, row] += 0.25
    with pytest.raises(GossipError, match=rf"row {row} of the mixing matrix sums to 1.25"):
        weights.validate(matrix, n)


def test_known_weights_of_each_rule():
    path = nx.path_graph(3).to_directed()  # degrees 1, 2, 1
    np.testing.assert_allclose(weights.weigh(path, "metropolis") * 3, [[2, 1, 0], [1, 1, 1], [0, 1, 2]])
    np.testing.assert_allclose(weights.weigh(path, "lazy_metropolis") * 6, [[5, 1, 0], [1, 4, 1], [0, 1, 5]])
    star = nx.star_graph(3).to_directed()
    star.remove_node(3)
    star.add_edges_from([(1, 2), (2, 1), (3, 2), (2, 3)])  # degrees 2, 2, 3, 1
    assert weights.weigh(star, "max_degree")[0, 1] == 1 / 4
    assert weights.weigh(star, "metropolis")[0, 1] == 1 / 3
    with pytest.raises(GossipError, match="'metroplis'") as caught:
        weights.weigh(path, "metroplis")
    assert caught.value.where == "gossip.weights"


@pytest.mark.parametrize("n", [3, 4, 5, 8, 16])
def test_spectral_gaps_are_the_analytic_ones(n: int):
    ring = max(abs(1 + 2 * math.cos(2 * math.pi * k / n)) / 3 for k in range(1, n))
    assert weights.spectral_gap([matrix_of("ring", n)]) == pytest.approx(1 - ring)
    assert weights.spectral_gap([matrix_of("complete", n)]) == 1.0
    assert weights.spectral_gap([matrix_of("star", n)]) == pytest.approx(1 / n)
    assert weights.spectral_gap([matrix_of("isolated", n)]) == 0.0


@pytest.mark.parametrize("n", [4, 8, 16])
def test_exponential_graphs_have_the_published_gaps(n: int):
    log = (n - 1).bit_length()
    exponential = matrix_of("exponential", n)
    assert set(np.unique(exponential)) <= {0.0, 1 / (1 + log)} or np.allclose(
        exponential[exponential > 0], 1 / (1 + log)
    )
    assert weights.spectral_gap([exponential]) == pytest.approx(2 / (1 + log))  # Ying et al. 2021, n even
    one_peer = [weights.weigh(graph, "metropolis") for graph in build_graphs("one_peer_exponential", n)]
    assert weights.spectral_gap(one_peer) == 1.0
    assert weights.spectral_gap(one_peer[:1]) < 1.0


def test_gap_of_a_period_is_reported_per_averaging():
    half = matrix_of("ring", 5)
    assert weights.spectral_gap([half, half]) == pytest.approx(weights.spectral_gap([half]))


@pytest.mark.parametrize("text", ["1/3 1/3 1/3\n" * 3, "# W\n1/3,1/3,1/3\n\n1/3;1/3;1/3\n1/3, 1/3, 1/3\n"])
def test_a_matrix_file_may_hold_fractions(tmp_path, text: str):
    path = tmp_path / "w.txt"
    path.write_text(text)
    np.testing.assert_allclose(weights.load(str(path), 3), np.full((3, 3), 1 / 3), rtol=1e-15)


def test_rounded_numbers_are_scaled_back_to_sums_of_one(tmp_path):
    path = tmp_path / "w.csv"
    path.write_text("0.333333,0.333333,0.333333\n" * 3)
    matrix = weights.load(str(path), 3)
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0, atol=1e-15)
    np.testing.assert_allclose(matrix.sum(axis=0), 1.0, atol=1e-15)


@pytest.mark.parametrize(
    ("text", "where", "fact"),
    [
        ("1 0\n0 x\n", "w.txt:2", "'x' is not a number"),
        ("1 0\n0 1/0\n", "w.txt:2", "'1/0' is not a number"),
        ("1 0 0\n0 1\n", "w.txt:1", "row 0 has 3 numbers, expected 2"),
        ("1 0\n", "w.txt", "has shape (1, 2), expected (2, 2)"),
        ("", "w.txt", "has shape (0, 2)"),
        ("0.5 0.5\nnan 0.5\n", "w.txt", "row 1, column 0 is not finite"),
        ("0.5 inf\n0.5 0.5\n", "w.txt", "row 0, column 1 is not finite"),
        ("1.5 -0.5\n-0.5 1.5\n", "w.txt", "row 0, column 1 is negative: -0.5"),
        ("0.5 0.5\n0.5 0.4\n", "w.txt", "row 1 of the mixing matrix sums to 0.9, not to 1"),
        ("0.5 0.5\n0.4 0.6\n", "w.txt", "column 0 of the mixing matrix sums to 0.9"),
        ("1 0\n0 1\n", "w.txt", "clients [0] and clients [1] never mix"),
        ("0 1\n1 0\n", "w.txt", "swaps models in a cycle"),
    ],
)
def test_a_bad_matrix_names_its_place(tmp_path, text: str, where: str, fact: str):
    path = tmp_path / "w.txt"
    path.write_text(text)
    with pytest.raises(GossipError) as caught:
        weights.load(str(path), 2)
    assert caught.value.where.endswith(where)
    assert fact in caught.value.what
    assert caught.value.fix


def test_an_unreadable_matrix_names_its_key(tmp_path):
    with pytest.raises(GossipError) as caught:
        weights.load(str(tmp_path), 2)
    assert caught.value.where == f"gossip.matrix={tmp_path}"

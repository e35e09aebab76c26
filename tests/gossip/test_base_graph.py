"""The Base-(k+1) graph: any number of clients agree exactly after a short period, few neighbours at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest

from deca_ds.config.schema import GossipConfig
from deca_ds.gossip.base_graph import base_graph
from deca_ds.gossip.late import check_wait
from deca_ds.gossip.schedule import build_mixing


@pytest.mark.parametrize("degree", [1, 2, 3, 6])
def test_all_agree_after_a_period_with_few_neighbours_at_a_time(degree: int):
    for n in range(1, 34):
        matrices = base_graph(n, degree)
        assert len(matrices) <= max(1, 2 * math.log(n, degree + 1) + 2)  # theorem 1 of the paper
        product = np.eye(n)
        for matrix in matrices:
            off_diagonal = matrix - np.diag(np.diag(matrix))
            assert np.count_nonzero(off_diagonal, axis=1).max() <= degree
            np.testing.assert_array_equal(matrix, matrix.T)
            product = matrix @ product
        np.testing.assert_allclose(product, np.full((n, n), 1 / n), atol=1e-14)


def test_no_client_needs_more_neighbours_than_there_are_others():
    for most, asked in zip(base_graph(7, 6), base_graph(7, 10**12), strict=True):
        np.testing.assert_array_equal(most, asked)


def test_of_six_clients_the_period_is_that_of_two_groups_of_three():
    assert [len(base_graph(n, 1)) for n in (2, 3, 4, 5, 6, 7, 8)] == [1, 3, 2, 5, 4, 5, 3]
    assert [len(base_graph(n, 2)) for n in (3, 4, 6, 9)] == [1, 2, 2, 2]


def test_three_clients_agree_in_three_averagings_of_pairs():
    """Two agree; one of them takes a third of the difference to the other client, which takes two; the two agree."""
    first, second, third = base_graph(3, 1)
    half = [[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]]
    np.testing.assert_array_equal(first, half)
    np.testing.assert_allclose(second, [[1 / 3, 0, 2 / 3], [0, 1, 0], [2 / 3, 0, 1 / 3]])
    np.testing.assert_array_equal(third, half)


def test_the_configuration_chooses_graph_and_degree():
    mixing = build_mixing(GossipConfig(graph="base", degree=2), 5, seed=0)
    assert (mixing.max_sources, mixing.period, mixing.spectral_gap) == (2, 3, 1.0)
    assert mixing.summary().startswith("base (degree 2) on 5 clients, period 3: at most 2 neighbours a client")
    check_wait(1.0, mixing)  # symmetric, so that a late neighbour may be left out

"""The matrices that survivors go on with."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deca_ds.config.schema import GossipConfig
from deca_ds.gossip import survive
from deca_ds.gossip.schedule import MixingSchedule, build_mixing

GRAPHS = ["ring", "complete", "star", "exponential", "one_peer_exponential", "erdos_renyi", "bipartite", "isolated"]


@st.composite
def losses(draw) -> tuple[MixingSchedule, list[int]]:
    """A schedule and clients that are gone, some or none."""
    n = draw(st.integers(2, 9))
    config = GossipConfig(
        graph=draw(st.sampled_from(GRAPHS)), weights=draw(st.sampled_from(["metropolis", "lazy_metropolis"]))
    )
    return build_mixing(config, n, seed=draw(st.integers(0, 99))), sorted(draw(st.sets(st.integers(0, n - 1))))


@settings(max_examples=200, deadline=None)
@given(losses())
def test_doubly_stochastic_symmetric_and_on_surviving_edges_alone(case):
    mixing, missing = case
    left = survive.without(mixing, missing)
    assert left.size == mixing.size and left.period == mixing.period
    if not missing:
        assert left is mixing
        return
    living = [client for client in range(mixing.size) if client not in missing]
    for before, after in zip(mixing.matrices, left.matrices, strict=True):
        np.testing.assert_allclose(after.sum(axis=0), 1, atol=1e-12)
        np.testing.assert_allclose(after, after.T, atol=1e-15)
        assert (after >= 0).all() and (after[missing, missing] == 1).all()
        joined = (before + before.T > 0) & ~np.eye(mixing.size, dtype=bool)
        joined[missing] = joined[:, missing] = False
        off_diagonal = after - np.diag(after.diagonal())
        np.testing.assert_array_equal(off_diagonal > 0, joined)
        degree = joined.sum(axis=0)
        for i, j in np.argwhere(joined):
            assert after[i, j] == pytest.approx(1 / (1 + max(degree[i], degree[j])))
    if living:
        gap, pieces = survive.spectral_gap(left, living), survive.parts(left, living)
        assert 0 <= gap <= 1 and sorted(sum(pieces, [])) == living
        if len(pieces) > 1:
            assert gap == 0
        union = nx.Graph((i, j) for m in left.matrices for i, j in np.argwhere(m > 0) if i in living and j in living)
        assert len(pieces) == nx.number_connected_components(union)


def test_a_star_without_its_centre_falls_apart():
    star = build_mixing(GossipConfig(graph="star"), 4, seed=0)
    assert survive.parts(survive.without(star, [0]), [1, 2, 3]) == [[1], [2], [3]]
    leaf = survive.without(star, [2])
    assert survive.parts(leaf, [0, 1, 3]) == [[0, 1, 3]]
    assert leaf.matrix(0)[1].tolist() == pytest.approx([1 / 3, 2 / 3, 0, 0])
    assert "without client 2" in leaf.summary()

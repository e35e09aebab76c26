"""The matrices that survivors continue with."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import networkx as nx
import numpy as np
import pytest
import torch
from gossip_worker import mix
from hypothesis import given, settings
from hypothesis import strategies as st

from deca_ds.config.schema import GossipConfig
from deca_ds.errors import GossipError, MessageError
from deca_ds.gossip import subset
from deca_ds.gossip.clip import Clip
from deca_ds.gossip.gossip import Gossip
from deca_ds.gossip.schedule import MixingSchedule, build_mixing
from deca_ds.gossip.strategies import WINDOW, begin
from deca_ds.transport.commit import Commit
from deca_ds.transport.local import LocalNetwork

GRAPHS = ["ring", "complete", "star", "exponential", "one_peer_exponential", "bipartite", "isolated"]


@st.composite
def losses(draw) -> tuple[MixingSchedule, list[int]]:
    """A schedule and clients that are gone, some or none."""
    n = draw(st.integers(2, 9))
    config = GossipConfig(
        graph=draw(st.sampled_from(GRAPHS)), weights=draw(st.sampled_from(["metropolis", "lazy_metropolis"]))
    )
    return build_mixing(config, n, seed=draw(st.integers(0, 99))), sorted(draw(st.sets(st.integers(0, n - 1))))


@settings(max_examples=200)
@given(losses())
def test_doubly_stochastic_symmetric_and_on_surviving_edges_alone(case):
    mixing, missing = case
    left = subset.without(mixing, missing)
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
        gap, pieces = subset.spectral_gap(left, living), subset.parts(left, living)
        assert 0 <= gap <= 1 and sorted(sum(pieces, [])) == living
        if len(pieces) > 1:
            assert gap == 0
        union = nx.Graph((i, j) for m in left.matrices for i, j in np.argwhere(m > 0) if i in living and j in living)
        assert len(pieces) == nx.number_connected_components(union)


@settings(max_examples=200)
@given(st.integers(2, 17), st.integers(1, 3), st.data())
def test_whoever_is_left_of_the_base_graph_agrees_after_a_period(n, degree, data):
    missing = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=n - 1)))
    left = [client for client in range(n) if client not in missing]
    mixing = subset.without(build_mixing(GossipConfig(graph="base", degree=degree), n, seed=0), missing)
    assert mixing.size == n and mixing.max_sources <= degree
    product = np.eye(n)
    for matrix in mixing.matrices:
        np.testing.assert_array_equal(matrix, matrix.T)
        np.testing.assert_array_equal(matrix[missing], np.eye(n)[missing])
        product = matrix @ product
    np.testing.assert_allclose(product[np.ix_(left, left)], 1 / len(left), atol=1e-12)
    assert subset.parts(mixing, left) == [left]
    assert subset.spectral_gap(mixing, left) == 1.0


def test_all_clients_of_the_base_graph_may_be_gone():
    mixing = subset.without(build_mixing(GossipConfig(graph="base"), 3, seed=0), [0, 1, 2])
    assert all((matrix == np.eye(3)).all() for matrix in mixing.matrices)


def test_a_star_without_its_centre_falls_apart():
    star = build_mixing(GossipConfig(graph="star"), 4, seed=0)
    assert subset.parts(subset.without(star, [0]), [1, 2, 3]) == [[1], [2], [3]]
    leaf = subset.without(star, [2])
    assert subset.parts(leaf, [0, 1, 3]) == [[0, 1, 3]]
    assert leaf.matrix(0)[1].tolist() == pytest.approx([1 / 3, 2 / 3, 0, 0])
    assert "without client 2" in leaf.summary()


class Repeating(Commit):
    """Everything that counts for all or for none is found not to count, once, and done again."""

    may_repeat = True

    def __init__(self, transport):
        self._transport = transport

    def run(self, work, *, last=False):
        work()
        self._transport.epoch += 1
        return work()


@pytest.mark.parametrize("radius", [None, 0.5])
def test_an_averaging_that_is_repeated_equals_one_that_is_not(radius):
    network, mixing = LocalNetwork(3), build_mixing(GossipConfig(graph="ring"), 3, seed=0)
    values = [torch.randn(2_500, generator=torch.Generator().manual_seed(i)) for i in range(3)]

    def average(client: int, repeats: bool) -> tuple[torch.Tensor, int]:
        transport = network.transport(client)
        commit, clip = Repeating(transport) if repeats else None, None if radius is None else Clip(radius)
        gossip = Gossip(transport, mixing, chunk_mib=0.001, commit=commit, clip=clip)
        return mix(gossip, 0, values[client]), gossip.bytes_sent

    for repeats in (False, True):
        with ThreadPoolExecutor(3) as pool:
            results = list(pool.map(average, range(3), [repeats] * 3))
        if not repeats and radius is None:
            # without clipping, `settle` has nothing to do here
            expected = [torch.stack(values).T @ torch.tensor(row, dtype=torch.float32) for row in mixing.matrix(0)]
            for (x, _), y in zip(results, expected, strict=True):
                torch.testing.assert_close(x, y)
        if not repeats:
            once = results
    for (x, sent), (again, sent_again) in zip(once, results, strict=True):
        assert torch.equal(x, again) and sent_again == 2 * sent


class Losing(Commit):
    """A client is lost before an averaging is done, and the others do it again without it."""

    may_repeat = True

    def __init__(self, gossip: Gossip, lost: int):
        self._gossip, self._lost = gossip, lost

    def run(self, work, *, last=False):
        work()
        self._gossip.average_by(subset.without(self._gossip.schedule, [self._lost]))
        self._gossip.transport.epoch += 1
        return work()


def test_a_client_without_a_neighbour_gets_one_when_another_is_lost():
    network, mixing = LocalNetwork(3), build_mixing(GossipConfig(graph="base"), 3, seed=0)
    t, alone, lost = next((t, i, j) for t in range(mixing.period) for i in range(3) if not mixing.sources(i, t)
                          for j in range(3) if j != i and subset.without(mixing, [j]).sources(i, t))  # fmt: skip
    values = [torch.full((5,), float(i)) for i in range(3)]

    def average(client: int) -> torch.Tensor | None:
        gossip = Gossip(network.transport(client), mixing)
        gossip.commit = Losing(gossip, lost)
        averaging, (chunk,) = begin(gossip, t), gossip.chunks([5])
        assert averaging.mixes and averaging.send(chunk, "x", values[client]) == []
        means = list(averaging.settle())
        assert averaging.mixes == bool(means)
        return means[0].values.clone() if means else None

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(average, range(3)))
    (other,) = {0, 1, 2} - {alone, lost}
    assert found[lost] is None
    for client in (alone, other):
        torch.testing.assert_close(found[client], (values[alone] + values[other]) / 2)


def test_only_own_messages_that_are_not_finite_end_a_client_where_others_continue():
    network = LocalNetwork(2)
    transport, mixing = network.transport(0), build_mixing(GossipConfig(graph="ring"), 2, seed=0)
    gossip = Gossip(transport, mixing, commit=Repeating(transport))
    with pytest.raises(GossipError, match="1 of 3 values of client 0 are not finite"):
        mix(gossip, 0, torch.tensor([1.0, torch.nan, 2.0]))
    assert not network.mailboxes, "nothing of it was sent"


def test_after_a_message_has_failed_a_rank_comes_to_the_commit_without_a_sign_of_moving_on():
    """The clients that drop a hanging one measure how long nobody has moved on."""
    transport, mixing = LocalNetwork(2, 0.05).transport(0), build_mixing(GossipConfig(graph="ring"), 2, seed=0)
    gossip, x = Gossip(transport, mixing, 4 * 8 / 2**20, commit=Repeating(transport)), torch.zeros(8 * (WINDOW + 3))
    averaging, chunks = begin(gossip, 0), gossip.chunks([x.numel()])
    for chunk in chunks[: WINDOW + 1]:  # the last one makes room: client 1 does not answer
        averaging.send(chunk, "x", x[chunk.part])
    moved, sent = transport.progress.moved, gossip.bytes_sent
    for chunk in chunks[WINDOW + 1 :]:
        averaging.send(chunk, "x", x[chunk.part])
    assert (transport.progress.moved, gossip.bytes_sent) == (moved, sent)
    with pytest.raises(MessageError, match="no message from rank 1"):
        averaging.settle()

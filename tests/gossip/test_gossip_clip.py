"""Clipped gossip against a dense NumPy reference, and messages that are refused before anything is averaged."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from dense_reference import average
from gossip_worker import mix
from hypothesis import given
from hypothesis import strategies as st

from deca_ds.config import load_config
from deca_ds.config.schema import GossipConfig
from deca_ds.errors import DIVERGED, ConfigError, GossipError
from deca_ds.gossip.clip import Clip, clipped_weights
from deca_ds.gossip.gossip import Gossip
from deca_ds.gossip.schedule import build_mixing
from deca_ds.gossip.strategies import begin
from deca_ds.simulation.averaging import means_of
from deca_ds.training.chosen_method import check_method
from deca_ds.transport.local import LocalNetwork

CLIENTS, NUMEL, CHUNK_MIB = 4, 1000, 0.001


def clipped(x: torch.Tensor, graph: str, radius: float | None, steps: int = 3) -> torch.Tensor:
    """Gossip of all clients in threads, chunk by chunk. x: [n, numel]."""
    network = LocalNetwork(CLIENTS, 100.0)
    schedule = build_mixing(GossipConfig(graph=graph), CLIENTS, seed=4)

    def body(client: int) -> torch.Tensor:
        clip = None if radius is None else Clip(radius)
        gossip, own = Gossip(network.transport(client), schedule, CHUNK_MIB, clip=clip), x[client]
        for t in range(steps):
            own = mix(gossip, t, own)
        return own

    with ThreadPoolExecutor(CLIENTS) as pool:
        return torch.stack(list(pool.map(body, range(CLIENTS))))


@pytest.mark.parametrize("graph", ["ring", "star", "one_peer_exponential"])
@pytest.mark.parametrize("radius", [5.0, 40.0, 1e6])
def test_clipped_gossip_is_the_papers_equation(graph, radius):
    x = torch.randn(CLIENTS, NUMEL, generator=torch.Generator().manual_seed(1))
    x[2] *= 30  # far from the others
    schedule, expected = build_mixing(GossipConfig(graph=graph), CLIENTS, seed=4), x.double().numpy()
    for t in range(3):
        expected = average(schedule.matrix(t), expected, radius)
    np.testing.assert_allclose(clipped(x, graph, radius).numpy(), expected, atol=2e-4)


def test_a_radius_that_nothing_reaches_changes_no_bit():
    x = torch.randn(CLIENTS, NUMEL, generator=torch.Generator().manual_seed(2))
    assert torch.equal(clipped(x, "ring", 1e9), clipped(x, "ring", None))


def test_clipping_bounds_what_one_neighbour_does():
    x = torch.zeros(CLIENTS, NUMEL)
    x[3] = 1e20  # float32 squares of it overflow
    mixed = clipped(x, "complete", 1.0, steps=1)
    assert torch.linalg.vector_norm(mixed[:3], dim=1).max() <= 1.0


def test_the_mean_stays_with_symmetric_weights_only():
    x = torch.randn(CLIENTS, NUMEL, generator=torch.Generator().manual_seed(3)).double().numpy()
    x[1] *= 4
    for graph, stays in (("ring", True), ("star", True), ("one_peer_exponential", False)):
        w = build_mixing(GossipConfig(graph=graph), CLIENTS, seed=4).matrix(0)
        mixed = clipped(torch.from_numpy(x).float(), graph, 30.0, steps=1).double().numpy()
        assert np.allclose(mixed.mean(axis=0), x.mean(axis=0), atol=1e-5) == stays == np.array_equal(w, w.T)


@given(
    st.lists(st.floats(0.01, 1), min_size=2, max_size=6),
    st.lists(st.floats(0, 1e30), min_size=5, max_size=5),
    st.floats(1e-3, 1e3),
)
def test_rows_of_clipped_weights_sum_to_one(raw, distances, radius):
    weights = {j: weight / sum(raw) for j, weight in enumerate(raw)}
    neighbours = {j: distances[j - 1] for j in weights if j != 0}
    row = clipped_weights(weights, 0, neighbours, radius)
    assert sum(row.values()) == pytest.approx(1) and min(row.values()) >= 0
    for j, distance in neighbours.items():
        assert row[j] * distance <= weights[j] * radius * (1 + 1e-9)


@pytest.mark.parametrize("radius", [None, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_poisoned_message_is_refused_by_name_before_anything_of_it_is_used(radius, value):
    network, schedule = LocalNetwork(2, 100.0), build_mixing(GossipConfig(), 2, seed=0)
    clip = None if radius is None else Clip(radius)
    here, there = (Gossip(network.transport(i), schedule, clip=clip) for i in range(2))
    here.transport.progress.enter("gradient", step=412, block="layers 0-1")
    poison = torch.ones(50)
    poison[7] = value
    own = torch.arange(50.0)
    (chunk,) = there.chunks([50])
    begin(there, 3).send(chunk, "x", poison)
    with pytest.raises(GossipError) as caught:
        mix(here, 3, own)
    assert "1 of 50 values of client 1 are not finite (averaging 3)" in caught.value.what
    assert caught.value.where == "client 0, gossip, step 412, block layers 0-1"
    assert DIVERGED in str(caught.value), "or a run that ends so could not continue with another learning rate"
    assert torch.equal(own, torch.arange(50.0))


def test_only_methods_that_send_parameters_alone_can_clip():
    check_method(load_config(None, ["model.path=x", "gossip.clip_radius=1"]))
    with pytest.raises(ConfigError, match=r"gt-adam sends grad and tracker, for which one gossip\.clip_radius"):
        check_method(load_config(None, ["model.path=x", "gossip.clip_radius=1", "algorithm.method=gt-adam"]))
    with pytest.raises(ConfigError, match=r"gossip\.clip_radius = 0"):
        load_config(None, ["model.path=x", "gossip.clip_radius=0"])


def test_the_simulation_clips_alike():
    x = torch.randn(CLIENTS, NUMEL, generator=torch.Generator().manual_seed(5))
    mixing = build_mixing(GossipConfig(graph="one_peer_exponential"), CLIENTS, seed=4)
    mixed = means_of({"theta": x}, mixing, 0, GossipConfig(clip_radius=20.0))["theta"]
    np.testing.assert_allclose(mixed.numpy(), clipped(x, "one_peer_exponential", 20.0, steps=1).numpy(), atol=1e-5)

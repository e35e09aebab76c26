"""What theory says about a graph, against averagings that are carried out."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

from deca_ds.algorithm.methods import build_rule
from deca_ds.config.schema import AlgorithmConfig, GossipConfig
from deca_ds.config.written import choices
from deca_ds.errors import UserError
from deca_ds.gossip.schedule import build_mixing
from deca_ds.gossip.theory import (
    agreement,
    averagings_to_agree,
    large_correction,
    large_momentum,
    left_with_correction,
    left_with_momentum,
    predicted_disagreement,
    slow_mixing,
)


def mixing(graph: str, clients: int):
    return build_mixing(GossipConfig(graph=graph), clients, 0)


@pytest.mark.parametrize("graph", ["ring", "star", "erdos_renyi", "exponential", "one_peer_exponential"])
def test_disagreement_shrinks_as_predicted(graph):
    schedule = mixing(graph, 16)
    averagings = schedule.period * math.ceil(averagings_to_agree(schedule) / schedule.period)
    values = np.random.default_rng(0).standard_normal((16, 50))
    before = np.linalg.norm(values - values.mean(axis=0))
    for t in range(averagings):
        values = schedule.matrix(t) @ values
    assert np.linalg.norm(values - values.mean(axis=0)) <= before / math.e * 1.000001


def test_the_bound_is_reached_by_the_slowest_mode_of_a_ring():
    schedule, lr = mixing("ring", 8), 0.01
    apart = np.cos(2 * np.pi * np.arange(8) / 8)  # eigenvector of the second eigenvalue
    values = np.zeros(8)
    for t in range(400):
        values = schedule.matrix(t) @ (values + 3 * lr * apart)
    assert np.abs(values).max() == pytest.approx(predicted_disagreement(schedule.spectral_gap, lr, 3), rel=1e-6)


def test_isolated_clients_never_agree_and_those_of_a_complete_graph_after_one_averaging():
    assert averagings_to_agree(mixing("isolated", 3)) == math.inf == predicted_disagreement(0.0, 0.1, 1)
    assert averagings_to_agree(mixing("complete", 3)) == 1.0 and predicted_disagreement(1.0, 0.1, 1) == 0.0


@pytest.mark.parametrize(
    ("graph", "clients", "told"),
    [
        ("ring", 1, "one client averages with nobody"),
        ("isolated", 3, "every client trains alone"),
        ("ring", 2, "after every averaging all clients have the same block, .* gossip.weights=lazy_metropolis"),
        ("ring", 3, "after every averaging all clients have the same block"),
        ("complete", 9, "after every averaging all clients have the same block"),
        ("one_peer_exponential", 8, "after every 3 averagings all clients have the same block"),
        ("base", 6, "after every 4 averagings all clients have the same block"),
        ("ring", 4, "every averaging brings the clients' models 3.0 times closer together"),
        ("one_peer_exponential", 5, r"every 3 averagings bring the clients' models \d.\d times closer together"),
        ("ring", 64, "about 311 averagings bring the clients' models 2.7 times closer together"),
    ],
)
def test_what_averagings_do_is_told_in_words(graph, clients, told):
    assert re.match(told, agreement(mixing(graph, clients)))


def test_an_averaging_brings_clients_closer_by_the_factor_that_is_told():
    """In the worst case of a symmetric matrix, by just that."""
    schedule = mixing("ring", 4)
    values = np.array([1.0, 0.0, -1.0, 0.0])
    assert np.linalg.norm(values) / np.linalg.norm(schedule.matrix(0) @ values) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("graph", "clients", "changes", "words"),
    [
        ("ring", 8, {}, []),
        ("isolated", 8, {}, []),
        ("complete", 64, {"inner_steps": 1, "lr": 1.0}, []),
        ("ring", 64, {}, ["for this number of inner steps: a block is averaged 48 times", "for this learning rate"]),
        ("ring", 64, {"lr": 1e-6}, ["for this number of inner steps"]),
        ("ring", 8, {"inner_steps": 4}, ["for this number of inner steps: a block is averaged 4 times"]),
        ("ring", 8, {"gossip_every": 24}, ["for this number of inner steps: a block is averaged 2 times"]),
        ("ring", 8, {"lr": 0.01}, ["for this learning rate: weights of different clients may stay 0.041 apart"]),
    ],
)
def test_slow_graphs_are_warned_of(graph, clients, changes, words):
    settings = {"inner_steps": 48, "gossip_every": 1, "lr": 5e-5, "weight_scale": 0.02} | changes
    found = slow_mixing(mixing(graph, clients), **settings)
    assert len(found) == len(words)
    for sentence, word in zip(found, words, strict=True):
        assert word in sentence and ("gossip.graph" in sentence or "optimizer.lr" in sentence)


@pytest.mark.parametrize("graph", ["ring", "erdos_renyi", "complete", "star"])
@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.3, 0.9])
def test_gasloc_shrinks_a_disagreement_at_the_predicted_rate(graph, momentum):
    """Without local steps, by the method's own rule; the rate is of many averagings, at worst and reached."""
    matrix, rule = mixing(graph, 8).matrix(0), build_rule("gasloc", outer_momentum=momentum)
    mixed, start = torch.tensor(matrix), np.random.default_rng(0).standard_normal((8, 5))
    state = {name: torch.zeros(8, 5, dtype=torch.float64) for name in ("theta", "grad", "previous")}
    state["theta"].copy_(torch.tensor(start - start.mean(axis=0)))
    rule.open(state)
    sizes = []
    for _ in range(160):
        state["grad"].copy_(state["theta"])
        rule.accept(state, "grad", mixed @ state["grad"])
        sizes.append(max(1e-300, float(state["theta"].norm())))
    rate = (max(sizes[150:]) / max(sizes[50:60])) ** (1 / 100)
    if sizes[-1] > 1e-12:
        assert rate == pytest.approx(left_with_momentum(matrix, momentum), rel=0.01)
    assert left_with_momentum(matrix, 0.0) == pytest.approx(1 - mixing(graph, 8).spectral_gap)


def test_the_best_momentum_of_a_graph_shrinks_disagreement_faster_than_any_other():
    gap = mixing("ring", 8).spectral_gap
    matrix, best = mixing("ring", 8).matrix(0), (1 - math.sqrt(gap)) ** 2
    assert left_with_momentum(matrix, best) == pytest.approx(math.sqrt(best), rel=1e-6) == 1 - math.sqrt(gap)
    assert left_with_momentum(matrix, 0.9) == pytest.approx(math.sqrt(0.9))
    for other in (best / 2, 1.5 * best, 0.9):
        assert left_with_momentum(matrix, other) > left_with_momentum(matrix, best) + 0.05


@pytest.mark.parametrize(
    ("graph", "clients", "momentum", "words"),
    [
        ("ring", 8, 0.9, ["up to 0.95 of what keeps the clients apart, and 0.8 without momentum", "= 0.31 brings"]),
        ("complete", 8, 0.9, ["up to 0.95 of what keeps the clients apart, and 0 without momentum", "= 0 brings"]),
        ("ring", 8, 0.3, []),
        ("ring", 8, 0.0, []),
        ("ring", 16, 0.9, []),
        ("isolated", 8, 0.9, []),
        ("exponential", 8, 0.9, []),
        ("one_peer_exponential", 8, 0.9, []),
        ("ring", 1, 0.9, []),
    ],
)
def test_a_momentum_that_keeps_clients_apart_is_warned_of(graph, clients, momentum, words):
    found = large_momentum(mixing(graph, clients), momentum)
    assert len(found) == bool(words)
    for sentence in found:
        assert all(word in sentence for word in words)
        assert sentence.startswith(f"algorithm.outer_momentum={momentum:g} is large for this graph: ")


@pytest.mark.parametrize("clients", [2, 3, 4, 7, 8, 16])
@pytest.mark.parametrize("graph", [name for name in choices("gossip.graph") if name not in ("isolated", "edge_list")])
def test_exact_diffusion_s_usual_correction_brings_clients_together_on_every_graph(graph, clients):
    try:
        schedule = mixing(graph, clients)
    except UserError:
        pytest.skip(f"there is no {graph} of {clients} clients")
    assert left_with_correction(schedule, AlgorithmConfig().correction) < 0.99
    assert large_correction(schedule, AlgorithmConfig().correction) == []


def test_what_a_correction_leaves_is_the_largest_root_of_the_averaging_s_slowest_mode():
    """z^2 - (1 + c) w z + c w for the eigenvalues w of (I + W) / 2: with c = 0.9 all roots are complex."""
    schedule = mixing("ring", 8)
    slowest = np.sort(np.linalg.eigvalsh((np.eye(8) + schedule.matrix(0)) / 2))[-2]
    assert left_with_correction(schedule, 0.9) == pytest.approx(math.sqrt(0.9 * slowest), abs=0.01)
    assert left_with_correction(mixing("complete", 4), 0.0) == pytest.approx(0.5, abs=1e-6)


def test_a_correction_that_drives_clients_apart_is_warned_of():
    """On a graph that changes, a correction remembers what another averaging undid."""
    schedule = mixing("random_pairs", 16)
    (found,) = large_correction(schedule, 1.0)
    assert found.startswith("algorithm.correction=1 is too large for this graph: an averaging leaves 1.02 times")
    assert large_correction(mixing("isolated", 4), 1.0) == []


@pytest.mark.parametrize("graph", ["ring", "exponential"])
def test_with_a_correction_clients_stop_nearer_to_each_other(graph):
    """Each client is pulled by a constant step of its own: 1 - c of what the same averaging leaves without it."""
    schedule, apart = mixing(graph, 6), {}
    pulls = torch.tensor([[1.0], [1.0], [1.0], [-1.0], [-1.0], [-1.0]], dtype=torch.float64)
    for correction in (0.0, 0.9):
        rule = build_rule("deca-ed", signal="none", correction=correction)
        state = {"theta": torch.zeros(6, 1, dtype=torch.float64)}
        state |= {name: torch.zeros_like(state["theta"]) for name in ("grad", *rule.buffers)}
        w = torch.tensor(schedule.matrix(0))
        for r in range(600):
            state["grad"].copy_(pulls)
            rule.local_step(state, inner=r, lr=0.01)
            rule.accept(state, "grad", w @ state["grad"])
            rule.finish(state, lr=0.01, mixed=True)
        apart[correction] = (state["theta"] - state["theta"].mean()).norm()
    assert apart[0.0] > 0.01
    torch.testing.assert_close(apart[0.9], 0.1 * apart[0.0], rtol=1e-4, atol=0)

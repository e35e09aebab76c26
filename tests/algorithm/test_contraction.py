"""How fast clients agree by averagings alone, computed and carried out; what a rule says against a graph."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from deca_ds.algorithm.contraction import (
    contraction,
    with_correction,
    with_momentum,
    with_outer_step,
)
from deca_ds.algorithm.methods import build_rule
from deca_ds.config.schema import AlgorithmConfig, GossipConfig
from deca_ds.config.yaml_text import choices
from deca_ds.errors import UserError
from deca_ds.gossip.schedule import build_mixing

USUAL = AlgorithmConfig().correction


def matrices_of(graph: str, clients: int) -> list[torch.Tensor]:
    return [torch.tensor(matrix) for matrix in build_mixing(GossipConfig(graph=graph), clients, 0).matrices]


def gap_of(graph: str, clients: int) -> float:
    return build_mixing(GossipConfig(graph=graph), clients, 0).spectral_gap


GRAPHS = ["ring", "erdos_renyi", "complete", "star", "exponential", "base", "random_pairs"]


def largest_distances(method: str, momentum: float, matrices: list[torch.Tensor]) -> list[float]:
    """From the clients' mean, after each averaging by the method's own rule, without local steps."""
    rule, n = build_rule(method, outer_momentum=momentum), len(matrices[0])
    names = ("grad", *rule.buffers)
    state = {name: torch.zeros(n, 5, dtype=torch.float64) for name in names}
    state["theta"] = torch.tensor(np.random.default_rng(0).standard_normal((n, 5)))
    rule.open(state)
    distances = []
    for t in range(300):
        mixed = matrices[t % len(matrices)]
        joined = mixed.diagonal() < 1  # a client without neighbours does nothing
        state["grad"][joined] = state["theta"][joined]
        own = {name: values[joined] for name, values in state.items()}
        rule.accept(own, "grad", (mixed @ state["theta"])[joined])
        for name, values in own.items():
            state[name][joined] = values
        distances.append(float((state["theta"] - state["theta"].mean(dim=0)).norm()))
    return distances


@pytest.mark.parametrize("clients", [7, 8])
@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("momentum", [0.1, 0.3, 0.9])
@pytest.mark.parametrize("method", ["gasloc", "diloco", "noloco"])
def test_averagings_with_momentum_shrink_a_disagreement_at_the_predicted_rate(method, graph, clients, momentum):
    """Without local steps; the rate is of many averagings, at worst and reached."""
    matrices = matrices_of(graph, clients)
    average = (
        with_momentum(momentum) if method == "gasloc" else with_outer_step(0.7, momentum, nesterov=method == "diloco")
    )
    predicted, distances = contraction(matrices, average), largest_distances(method, momentum, matrices)
    smallest = next((t for t in range(300) if max(distances[t : t + 30]) < 1e-11), 300)
    if smallest < 120:  # too soon to measure a rate by
        assert predicted < 0.85
        return
    since = smallest // 2
    rate = (max(distances[smallest - 30 : smallest]) / max(distances[since - 30 : since])) ** (1 / (smallest - since))
    assert rate == pytest.approx(predicted, rel=0.02)


@pytest.mark.parametrize("clients", [3, 8])
@pytest.mark.parametrize("graph", ["ring", "erdos_renyi", "complete", "star", "base"])
def test_without_momentum_an_averaging_leaves_what_the_spectral_gap_says(graph, clients):
    left = contraction(matrices_of(graph, clients), with_momentum(0.0))
    assert left == pytest.approx(1 - gap_of(graph, clients), abs=1e-6)


def test_the_best_momentum_of_a_graph_shrinks_disagreement_faster_than_any_other():
    gap, (matrix,) = gap_of("ring", 8), matrices_of("ring", 8)
    best = (1 - math.sqrt(gap)) ** 2
    assert contraction([matrix], with_momentum(best)) == pytest.approx(math.sqrt(best), rel=2e-3)
    assert math.sqrt(best) == pytest.approx(1 - math.sqrt(gap))
    assert contraction([matrix], with_momentum(0.9)) == pytest.approx(math.sqrt(0.9), rel=2e-3)
    for other in (best / 2, 1.5 * best, 0.9):
        assert contraction([matrix], with_momentum(other)) > contraction([matrix], with_momentum(best)) + 0.05


@pytest.mark.parametrize(
    ("graph", "clients", "momentum", "words"),
    [
        ("ring", 8, 0.9, ["up to 0.95 of what keeps the clients apart, and 0.8 without momentum", "= 0.31 brings"]),
        ("complete", 8, 0.9, ["up to 0.95 of what keeps the clients apart, and 0 without momentum", "= 0 brings"]),
        ("ring", 8, 0.3, []),
        ("ring", 8, 0.0, []),
        ("ring", 16, 0.9, []),
        ("isolated", 8, 0.9, []),
        (
            "exponential",
            8,
            0.3,
            ["up to 0.83 of what keeps the clients apart, and 0.5 without", "a smaller one brings"],
        ),
        ("base", 3, 0.3, ["and 0 without momentum"]),
        ("ring", 1, 0.9, []),
    ],
)
def test_a_momentum_that_keeps_clients_apart_is_warned_of(graph, clients, momentum, words):
    found = build_rule("gasloc", outer_momentum=momentum).warnings(matrices_of(graph, clients))
    assert len(found) == bool(words)
    for sentence in found:
        assert all(word in sentence for word in words)
        assert sentence.startswith(f"algorithm.outer_momentum={momentum:g} is large for this graph: ")


@pytest.mark.parametrize(
    ("method", "graph", "momentum", "left"),
    [
        ("gasloc", "base", 0.9, "1.05"),
        ("gasloc", "one_peer_exponential", 0.9, "1.11"),
        ("noloco", "random_pairs", 0.9, "1.05"),
        ("noloco", "random_pairs", 0.3, None),
        ("noloco", "ring", 0.9, None),
        ("diloco", "base", 0.9, None),
        ("diloco", "complete", 0.9, None),
        ("noloco", "isolated", 0.9, None),
    ],
)
def test_a_momentum_that_drives_clients_apart_is_warned_of(method, graph, momentum, left):
    found = build_rule(method, outer_momentum=momentum).warnings(matrices_of(graph, 8))
    told = f"algorithm.outer_momentum={momentum:g} drives the clients apart on this graph: an averaging leaves {left} "
    assert [sentence[: len(told)] for sentence in found] == ([told] if left else [])


@pytest.mark.parametrize("clients", [2, 3, 4, 7, 8, 16])
@pytest.mark.parametrize("graph", [name for name in choices("gossip.graph") if name not in ("isolated", "edge_list")])
def test_exact_diffusion_s_usual_correction_brings_clients_together_on_every_graph(graph, clients):
    try:
        matrices = matrices_of(graph, clients)
    except UserError:
        pytest.skip(f"there is no {graph} of {clients} clients")
    assert contraction(matrices, with_correction(USUAL)) < 0.99
    assert build_rule("deca-ed", correction=USUAL).warnings(matrices) == []


def test_what_a_correction_leaves_is_the_largest_root_of_the_averaging_s_slowest_mode():
    """z^2 - (1 + c) w z + c w for the eigenvalues w of (I + W) / 2: with c = 0.9 all roots are complex."""
    (matrix,) = matrices_of("ring", 8)
    slowest = float(torch.linalg.eigvalsh((torch.eye(8) + matrix) / 2)[-2])
    assert contraction([matrix], with_correction(0.9)) == pytest.approx(math.sqrt(0.9 * slowest), abs=0.01)
    assert contraction(matrices_of("complete", 4), with_correction(0.0)) == pytest.approx(0.5, abs=1e-6)


def test_a_correction_that_drives_clients_apart_is_warned_of():
    """On a graph that changes, a correction remembers what another averaging undid."""
    rule = build_rule("deca-ed", correction=1.0)
    (found,) = rule.warnings(matrices_of("random_pairs", 16))
    assert found.startswith("algorithm.correction=1 is too large for this graph: an averaging leaves 1.02 times")
    assert rule.warnings(matrices_of("isolated", 4)) == rule.warnings(matrices_of("ring", 1)) == []


@pytest.mark.parametrize("graph", ["ring", "exponential"])
def test_with_a_correction_clients_stop_nearer_to_each_other(graph):
    """Each client is pulled by a constant step of its own: 1 - c of what the same averaging leaves without it."""
    (w,), apart = matrices_of(graph, 6), {}
    pulls = torch.tensor([[1.0], [1.0], [1.0], [-1.0], [-1.0], [-1.0]], dtype=torch.float64)
    for correction in (0.0, 0.9):
        rule = build_rule("deca-ed", signal="none", correction=correction)
        state = {"theta": torch.zeros(6, 1, dtype=torch.float64)}
        state |= {name: torch.zeros_like(state["theta"]) for name in ("grad", *rule.buffers)}
        for r in range(600):
            state["grad"].copy_(pulls)
            rule.local_step(state, inner=r, lr=0.01)
            rule.accept(state, "grad", w @ state["grad"])
            rule.finish(state, lr=0.01, mixed=True)
        apart[correction] = (state["theta"] - state["theta"].mean()).norm()
    assert apart[0.0] > 0.01
    torch.testing.assert_close(apart[0.9], 0.1 * apart[0.0], rtol=1e-4, atol=0)

"""How fast clients agree by averagings alone, computed and carried out; what a rule says against a graph."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from deca_ds.algorithm.contraction import contraction_with_correction, contraction_with_momentum
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


@pytest.mark.parametrize("graph", ["ring", "erdos_renyi", "complete", "star"])
@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.3, 0.9])
def test_gasloc_shrinks_a_disagreement_at_the_predicted_rate(graph, momentum):
    """Without local steps, by the method's own rule; the rate is of many averagings, at worst and reached."""
    (mixed,), rule = matrices_of(graph, 8), build_rule("gasloc", outer_momentum=momentum)
    start = np.random.default_rng(0).standard_normal((8, 5))
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
        assert rate == pytest.approx(contraction_with_momentum(mixed, momentum), rel=0.01)
    assert contraction_with_momentum(mixed, 0.0) == pytest.approx(1 - gap_of(graph, 8))


def test_the_best_momentum_of_a_graph_shrinks_disagreement_faster_than_any_other():
    gap, (matrix,) = gap_of("ring", 8), matrices_of("ring", 8)
    best = (1 - math.sqrt(gap)) ** 2
    assert contraction_with_momentum(matrix, best) == pytest.approx(math.sqrt(best), rel=1e-6) == 1 - math.sqrt(gap)
    assert contraction_with_momentum(matrix, 0.9) == pytest.approx(math.sqrt(0.9))
    for other in (best / 2, 1.5 * best, 0.9):
        assert contraction_with_momentum(matrix, other) > contraction_with_momentum(matrix, best) + 0.05


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
    found = build_rule("gasloc", outer_momentum=momentum).warnings(matrices_of(graph, clients))
    assert len(found) == bool(words)
    for sentence in found:
        assert all(word in sentence for word in words)
        assert sentence.startswith(f"algorithm.outer_momentum={momentum:g} is large for this graph: ")


@pytest.mark.parametrize("clients", [2, 3, 4, 7, 8, 16])
@pytest.mark.parametrize("graph", [name for name in choices("gossip.graph") if name not in ("isolated", "edge_list")])
def test_exact_diffusion_s_usual_correction_brings_clients_together_on_every_graph(graph, clients):
    try:
        matrices = matrices_of(graph, clients)
    except UserError:
        pytest.skip(f"there is no {graph} of {clients} clients")
    assert contraction_with_correction(matrices, USUAL) < 0.99
    assert build_rule("deca-ed", correction=USUAL).warnings(matrices) == []


def test_what_a_correction_leaves_is_the_largest_root_of_the_averaging_s_slowest_mode():
    """z^2 - (1 + c) w z + c w for the eigenvalues w of (I + W) / 2: with c = 0.9 all roots are complex."""
    (matrix,) = matrices_of("ring", 8)
    slowest = float(torch.linalg.eigvalsh((torch.eye(8) + matrix) / 2)[-2])
    assert contraction_with_correction([matrix], 0.9) == pytest.approx(math.sqrt(0.9 * slowest), abs=0.01)
    assert contraction_with_correction(matrices_of("complete", 4), 0.0) == pytest.approx(0.5, abs=1e-6)


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

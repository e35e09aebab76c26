"""One contract for every method: its rule on stacked clients against the dense reference, and what all promise."""

from __future__ import annotations

from itertools import cycle

import numpy as np
import pytest
import torch
from dense_reference import Coefficients, activation
from safetensors.torch import load, save

from deca_ds.algorithm.deca import SIGNALS, DecaRule
from deca_ds.algorithm.methods import METHODS, build_rule
from deca_ds.algorithm.rule import Rule
from deca_ds.config.schema import GossipConfig
from deca_ds.gossip.schedule import build_mixing

CLIENTS, NUMEL, STEPS, LR = 5, 40, 12, 0.02
EVERY_METHOD = [("deca", signal) for signal in SIGNALS] + [(name, "descent") for name in METHODS if name != "deca"]
GRAPHS = ["ring", "one_peer_exponential", "erdos_renyi"]
STATE_BYTES = {"gt-adam": 24, "diloco": 24}  # a parameter of the active block; 16 for the others


def problem(seed: int):
    """Quadratics with different minima and gradients that change from step to step, as mini-batches do."""
    rng = np.random.default_rng(seed)
    start = np.tile(rng.normal(size=NUMEL), (CLIENTS, 1))
    centre, curvature = rng.normal(size=(CLIENTS, NUMEL)), rng.uniform(0.5, 2, size=(CLIENTS, NUMEL))
    noise = rng.normal(scale=0.1, size=(STEPS, CLIENTS, NUMEL))
    return start, lambda step, i, x: curvature[i] * (x - centre[i]) + noise[step, i]


def stacked_state(rule: Rule, start: np.ndarray) -> dict[str, torch.Tensor]:
    theta = torch.tensor(start)
    state = {"theta": theta} | {name: torch.zeros_like(theta) for name in ("grad", *rule.buffers)}
    rule.open(state)
    return state


def run(rule: Rule, state, gradient, matrices, *, every: int, steps=range(STEPS), decay: float = 0.0) -> None:
    for r in steps:
        for i in range(CLIENTS):
            state["grad"][i] = torch.tensor(gradient(r, i, state["theta"][i].numpy()))
        rule.local_step(state, inner=r, lr=LR, decay=decay)
        mixes = (r + 1) % every == 0 or r == STEPS - 1
        if mixes:
            w = torch.tensor(next(matrices), dtype=state["theta"].dtype)
            for name in rule.travels:
                rule.accept(state, name, w @ state[name])
        else:
            rule.stay(state)
        norm = state["grad"].norm(dim=1, keepdim=True) if rule.needs_norm else 0.0
        rule.finish(state, lr=LR, norm=norm, mixed=mixes)


def matrices_of(graph: str) -> list[np.ndarray]:
    return list(build_mixing(GossipConfig(graph=graph), CLIENTS, seed=3).matrices)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize(("method", "signal"), EVERY_METHOD)
def test_a_method_equals_the_dense_reference(method, signal, graph, every):
    start, gradient = problem(seed=1)
    coefficients = {"a1": 0.8, "a2": 0.95, "b1": 0.7, "b2": 0.9, "eps": 1e-6, "outer_lr": 0.6, "outer_momentum": 0.5}
    rule = build_rule(method, signal=signal, **coefficients)
    state = stacked_state(rule, start)
    run(rule, state, gradient, cycle(matrices_of(graph)), every=every, decay=0.05)

    calls = [0] * CLIENTS

    def in_turn(i: int, x: np.ndarray) -> np.ndarray:
        calls[i] += 1
        return gradient(calls[i] - 1, i, x)

    c = Coefficients(method, signal, **coefficients)
    expected = activation(c, start, in_turn, cycle(matrices_of(graph)), steps=STEPS, every=every, lr=LR, decay=0.05)
    moved = np.abs(state["theta"].numpy() - start).max()
    assert moved > LR
    np.testing.assert_allclose(state["theta"].numpy(), np.stack([k.x for k in expected]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize(("method", "signal"), EVERY_METHOD)
def test_mixing_keeps_the_mean(method, signal, graph):
    """Of what the clients move to: the mean of theta over them is that of an exact averaging's, whatever the graph.
    gt-adam's trackers have the mean of the gradients at every step."""
    start, gradient = problem(seed=2)
    rule = build_rule(method, signal=signal)
    state = stacked_state(rule, start)
    for r, w in zip(range(6), cycle(matrices_of(graph)), strict=False):
        for i in range(CLIENTS):
            state["grad"][i] = torch.tensor(gradient(r, i, state["theta"][i].numpy()))
        gradients = state["grad"].mean(0)
        exact = {name: tensor.clone() for name, tensor in state.items()}
        for target, matrix in ((state, torch.tensor(w)), (exact, torch.full((CLIENTS, CLIENTS), 1 / CLIENTS).double())):
            rule.local_step(target, inner=r, lr=LR)
            if "tracker" in rule.buffers:
                torch.testing.assert_close(target["tracker"].mean(0), gradients, rtol=0, atol=1e-12)
            for name in rule.travels:
                rule.accept(target, name, matrix @ target[name])
            norm = target["grad"].norm(dim=1, keepdim=True) if rule.needs_norm else 0.0
            rule.finish(target, lr=LR, norm=norm, mixed=True)
        torch.testing.assert_close(state["theta"].mean(0), exact["theta"].mean(0), rtol=0, atol=1e-7)
    assert state["theta"].std(0).max() > 0


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize(("method", "signal"), EVERY_METHOD)
def test_a_saved_state_goes_on_as_if_never_interrupted(method, signal, every):
    start, gradient = problem(seed=3)
    rule = build_rule(method, signal=signal)
    whole = stacked_state(rule, start)
    run(rule, whole, gradient, cycle(matrices_of("ring")), every=every)

    first = stacked_state(rule, start)
    run(rule, first, gradient, cycle(matrices_of("ring")), every=every, steps=range(7))
    kept = {name: tensor for name, tensor in first.items() if name != "grad"}  # a gradient is made anew every step
    resumed = {**load(save(kept)), "grad": torch.full_like(first["theta"], torch.nan)}
    run(build_rule(method, signal=signal), resumed, gradient, cycle(matrices_of("ring")), every=every,
        steps=range(7, STEPS))  # fmt: skip
    assert torch.equal(resumed["theta"], whole["theta"])


@pytest.mark.parametrize(("method", "signal"), EVERY_METHOD)
def test_the_state_is_as_large_as_documented(method, signal):
    rule = build_rule(method, signal=signal)
    state = stacked_state(rule, np.zeros((CLIENTS, NUMEL), dtype=np.float32))
    run(rule, state, lambda r, i, x: np.ones(NUMEL, dtype=np.float32), cycle(matrices_of("ring")), every=2)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert sum(tensor.nbytes for tensor in state.values()) == STATE_BYTES.get(method, 16) * CLIENTS * NUMEL
    assert rule.bytes_per_parameter == STATE_BYTES.get(method, 16)


def test_a_rule_takes_only_its_own_coefficients():
    assert build_rule("adamw", signal="descent", outer_lr=0.1) == DecaRule(signal="none")
    with pytest.raises(ValueError, match=r"'adam'.*gossip-adam"):
        build_rule("adam")

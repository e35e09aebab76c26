"""What every method's rule promises, whatever it computes: `CONTRACT` is a list of checks of one rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from itertools import cycle
from types import ModuleType

import dense_reference
import numpy as np
import torch
from safetensors.torch import load, save

from deca_ds.algorithm.methods import build_rule
from deca_ds.algorithm.rule import Rule
from deca_ds.config.schema import AlgorithmConfig, GossipConfig
from deca_ds.gossip.schedule import build_mixing

CLIENTS, NUMEL, STEPS, LR = 5, 40, 12, 0.02
GRAPHS = ["ring", "one_peer_exponential", "erdos_renyi"]
# none is a default, so that a rule which does not read its coefficient differs from the reference
COEFFICIENTS = {
    "a1": 0.8,
    "a2": 0.95,
    "b1": 0.7,
    "b2": 0.9,
    "correction": 0.6,
    "eps": 1e-6,
    "outer_lr": 0.6,
    "outer_momentum": 0.5,
}


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


def coefficients_are_keys_of_the_configuration(rule: Rule) -> None:
    """And start from what is written there, so that none is silently another; of numbers the range is known."""
    assert is_dataclass(rule) and type(rule).__dataclass_params__.frozen, "decorate it with @dataclass(frozen=True)"
    defaults = {field.name: field.default for field in fields(AlgorithmConfig)}
    ranges = {field.name: field.metadata["allowed"] for field in fields(AlgorithmConfig)}
    for field in fields(rule):
        key = f"algorithm.{field.name}"
        assert field.name in defaults, f"add {key} to AlgorithmConfig in deca_ds/config/schema.py"
        assert defaults[field.name] == field.default, f"{key} has another default in deca_ds/config/schema.py"
        if not isinstance(field.default, str):
            assert ranges[field.name] is not None, f"say which values {key} may have: key(..., allowed=...)"
            differs = COEFFICIENTS.get(field.name, field.default) != field.default
            assert differs, f"add {field.name}, but not its default, to COEFFICIENTS in tests/method_contract.py"


def its_state_is_what_it_names(rule: Rule) -> None:
    """Buffers beside theta and the gradient, all of them used, and 4 bytes for each element; and what travels."""
    assert not {"theta", "grad"} & set(rule.buffers) and len(set(rule.buffers)) == len(rule.buffers)
    assert rule.travels[0] == "grad" and set(rule.travels) <= {"grad", *rule.buffers}, "grad, then buffers"
    state = stacked_state(rule, np.zeros((CLIENTS, NUMEL), dtype=np.float32))
    before = {name: tensor.data_ptr() for name, tensor in state.items()}
    signs = np.where(np.arange(CLIENTS) % 2, 1, -1)  # equal clients would have nothing to average
    run(rule, state, lambda r, i, x: np.full(NUMEL, signs[i], np.float32), cycle(matrices_of("ring")), every=2)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert {name: tensor.data_ptr() for name, tensor in state.items()} == before, "it writes into what it is given"
    assert sum(tensor.nbytes for tensor in state.values()) == rule.bytes_per_parameter * CLIENTS * NUMEL
    assert all(tensor.any() for name, tensor in state.items() if name != "grad"), "a buffer that nothing is kept in"


def a_part_is_worked_on_as_the_whole(rule: Rule) -> None:
    """Stacked, client by client and chunk by chunk: the same to the rounding at a chunk's end."""
    start, gradient = problem(seed=4)
    whole = stacked_state(rule, start)
    parts = {name: tensor.clone() for name, tensor in whole.items()}
    w = torch.tensor(matrices_of("ring")[0])
    for r in range(4):
        gradients = torch.stack([torch.tensor(gradient(r, i, whole["theta"][i].numpy())) for i in range(CLIENTS)])
        for state in (whole, parts):
            state["grad"].copy_(gradients)
        pieces = [(i, piece) for i in range(CLIENTS) for piece in (slice(0, 7), slice(7, 8), slice(8, NUMEL))]
        views = [(at, {name: tensor[at] for name, tensor in parts.items()}) for at in pieces]
        rule.local_step(whole, inner=r, lr=LR, decay=0.1)
        for _, view in views:
            rule.local_step(view, inner=r, lr=LR, decay=0.1)
        if mixed := r != 2:
            for name in rule.travels:
                average = w @ whole[name]
                for at, view in views:
                    rule.accept(view, name, average[at])
                rule.accept(whole, name, average)
        else:
            rule.stay(whole)
            for _, view in views:
                rule.stay(view)
        norm = whole["grad"].norm(dim=1, keepdim=True) if rule.needs_norm else 0.0
        rule.finish(whole, lr=LR, norm=norm, mixed=mixed)
        for (client, _), view in views:
            rule.finish(view, lr=LR, norm=norm[client] if rule.needs_norm else 0.0, mixed=mixed)
        for name in {*whole} - {"grad"}:
            torch.testing.assert_close(parts[name], whole[name], rtol=1e-13, atol=1e-13)


def without_a_neighbour_it_moves_to_its_own_candidate(rule: Rule) -> None:
    """And a parameter that no gradient reaches stays, with its moments."""
    start, gradient = problem(seed=5)
    state = stacked_state(rule, start)
    state["grad"].copy_(torch.stack([torch.tensor(gradient(0, i, start[i])) for i in range(CLIENTS)]))
    rule.local_step(state, inner=0, lr=LR, decay=0.1)
    candidate = state["grad"].clone()
    assert torch.equal(state["theta"], torch.tensor(start)), "theta is needed until the averaging"
    rule.stay(state)
    assert torch.equal(state["theta"], candidate) and not torch.equal(candidate, torch.tensor(start))
    rule.finish(state, lr=LR, norm=state["grad"].norm(dim=1, keepdim=True) if rule.needs_norm else 0.0, mixed=False)
    state["grad"].zero_()
    kept = {name: state[name].clone() for name in ("theta", "m", "v") if name in state}
    rule.skip_step(state)
    assert torch.equal(state["grad"], state["theta"])
    assert all(torch.equal(state[name], values) for name, values in kept.items())


def alone_is_the_local_step_and_stay(rule: Rule) -> None:
    start, gradient = problem(seed=6)
    state = stacked_state(rule, start)
    run(rule, state, gradient, cycle(matrices_of("ring")), every=2, steps=range(3))  # whose last step averages
    state["grad"].copy_(torch.stack([torch.tensor(gradient(3, i, start[i])) for i in range(CLIENTS)]))
    apart = {name: tensor.clone() for name, tensor in state.items()}
    rule.local_step(state, inner=3, lr=LR, decay=0.1, alone=True)
    rule.local_step(apart, inner=3, lr=LR, decay=0.1)
    rule.stay(apart)
    norm = apart["grad"].norm(dim=1, keepdim=True) if rule.needs_norm else 0.0
    for each in (state, apart):
        rule.finish(each, lr=LR, norm=norm, mixed=False)
    for name in {*state} - {"grad"}:
        torch.testing.assert_close(state[name], apart[name], rtol=1e-13, atol=1e-13, msg=f"{name} of a step alone")


def mixing_keeps_the_mean(rule: Rule) -> None:
    """Of what the clients move to: the mean of theta over them is that of an exact averaging's, whatever the graph."""
    start, gradient = problem(seed=2)
    for graph in GRAPHS:
        state = stacked_state(rule, start)
        for r, w in zip(range(6), cycle(matrices_of(graph)), strict=False):
            for i in range(CLIENTS):
                state["grad"][i] = torch.tensor(gradient(r, i, state["theta"][i].numpy()))
            exact = {name: tensor.clone() for name, tensor in state.items()}
            uniform = torch.full((CLIENTS, CLIENTS), 1 / CLIENTS).double()
            for target, matrix in ((state, torch.tensor(w)), (exact, uniform)):
                rule.local_step(target, inner=r, lr=LR)
                for name in rule.travels:
                    rule.accept(target, name, matrix @ target[name])
                norm = target["grad"].norm(dim=1, keepdim=True) if rule.needs_norm else 0.0
                rule.finish(target, lr=LR, norm=norm, mixed=True)
            torch.testing.assert_close(state["theta"].mean(0), exact["theta"].mean(0), rtol=0, atol=1e-7)
        assert state["theta"].std(0).max() > 0


def a_saved_state_continues_as_if_never_interrupted(rule: Rule) -> None:
    start, gradient = problem(seed=3)
    for every in (1, 3):
        whole = stacked_state(rule, start)
        run(rule, whole, gradient, cycle(matrices_of("ring")), every=every)
        first = stacked_state(rule, start)
        run(rule, first, gradient, cycle(matrices_of("ring")), every=every, steps=range(7))
        kept = {name: tensor for name, tensor in first.items() if name != "grad"}  # a gradient is made anew every step
        resumed = {**load(save(kept)), "grad": torch.full_like(first["theta"], torch.nan)}
        run(rule, resumed, gradient, cycle(matrices_of("ring")), every=every, steps=range(7, STEPS))
        assert torch.equal(resumed["theta"], whole["theta"])


def equals_the_dense_reference(
    method: str, signal: str, graph: str, every: int, reference: ModuleType = dense_reference
) -> None:
    start, gradient = problem(seed=1)
    rule = build_rule(method, signal=signal, **COEFFICIENTS)
    state = stacked_state(rule, start)
    run(rule, state, gradient, cycle(matrices_of(graph)), every=every, decay=0.05)

    calls = [0] * CLIENTS

    def in_turn(i: int, x: np.ndarray) -> np.ndarray:
        calls[i] += 1
        return gradient(calls[i] - 1, i, x)

    c, matrices = reference.Coefficients(method, signal, **COEFFICIENTS), cycle(matrices_of(graph))
    expected = reference.activation(c, start, in_turn, matrices, every=every, rates=[LR] * STEPS, decay=0.05)
    moved = np.abs(state["theta"].numpy() - start).max()
    assert moved > LR
    np.testing.assert_allclose(
        state["theta"].numpy(), np.stack([k.x for k in expected]), rtol=0, atol=1e-9, err_msg=unlike_reference(method)
    )


def unlike_reference(method: str) -> str:
    """What to look for if they differ."""
    return f"the rule of {method} and `activation` in tests/dense_reference.py must have the same equations for it"


CONTRACT: list[Callable[[Rule], None]] = [
    coefficients_are_keys_of_the_configuration,
    its_state_is_what_it_names,
    a_part_is_worked_on_as_the_whole,
    without_a_neighbour_it_moves_to_its_own_candidate,
    alone_is_the_local_step_and_stay,
    mixing_keeps_the_mean,
    a_saved_state_continues_as_if_never_interrupted,
]

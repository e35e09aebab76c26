"""Parameters without a gradient: against torch's AdamW, and every method against the dense reference."""

from itertools import cycle

import numpy as np
import pytest
import torch
from dense_reference import Coefficients, activation
from method_contract import (
    CLIENTS,
    COEFFICIENTS,
    LR,
    NUMEL,
    STEPS,
    matrices_of,
    problem,
    stacked_state,
    unlike_reference,
)
from test_methods import EVERY_METHOD

from deca_ds.algorithm.deca import DecaRule
from deca_ds.algorithm.local import LocalSteps, Run, local_step
from deca_ds.algorithm.methods import build_rule

SIZES, DECAYS = (16, 9, 9, 6), (True, True, False, False)


def reached_at(step: int, client: int) -> list[bool]:
    """The second parameter never gets a gradient, the third at some steps, from some clients."""
    return [True, False, (step + client) % 3 == 1, True]


def test_runs_are_as_long_as_they_can_be():
    steps = LocalSteps((4, 0, 6, 2, 3), (True, True, True, False, False))
    assert steps.next([True] * 5) == [Run(0, 10, True, 0), Run(10, 15, False, 0)]
    assert steps.next([True, True, False, True, True]) == [
        Run(0, 4, True, 1), Run(4, 10, True, None), Run(10, 15, False, 1)]  # fmt: skip
    assert steps.next([True] * 5) == [Run(0, 4, True, 2), Run(4, 10, True, 1), Run(10, 15, False, 2)]
    assert steps.made == [3, 3, 2, 3, 3]


@pytest.mark.parametrize("chunk", [40, 7])
def test_a_client_alone_is_adamw_where_gradients_are_missing(chunk):
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(size, dtype=torch.float64)) for size in SIZES]
    theta = torch.cat([p.detach() for p in parameters])
    groups = [{"params": [p], "weight_decay": 0.1 if decays else 0.0} for p, decays in zip(parameters, DECAYS)]  # noqa: B905
    adamw = torch.optim.AdamW(groups, lr=1e-2)
    state, steps = (
        {name: torch.zeros_like(theta) for name in ("grad", "m", "v")} | {"theta": theta},
        LocalSteps(SIZES, DECAYS),
    )
    rule = DecaRule(signal="none")
    for step in range(12):
        reached = reached_at(step, client=0)
        gradients = [torch.randn_like(p) if there else None for p, there in zip(parameters, reached, strict=True)]
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g
        adamw.step()
        state["grad"].copy_(torch.cat([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]))
        runs = steps.next(reached)
        for start in range(0, len(theta), chunk):
            local_step(rule, state, runs, slice(start, min(start + chunk, len(theta))), lr=1e-2, weight_decay=0.1)
        rule.stay(state)
        rule.finish(state, lr=1e-2, mixed=False)
    torch.testing.assert_close(theta, torch.cat([p.detach() for p in parameters]), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("every", "in_place"), [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize(("method", "signal"), EVERY_METHOD)
def test_a_method_equals_the_dense_reference_where_gradients_are_missing(method, signal, every, in_place):
    start, gradient = problem(seed=1)
    rule, matrices = build_rule(method, signal=signal, **COEFFICIENTS), cycle(matrices_of("one_peer_exponential"))
    state, steps = stacked_state(rule, start), [LocalSteps(SIZES, DECAYS) for _ in range(CLIENTS)]
    decay = np.repeat([0.05 if decays else 0.0 for decays in DECAYS], SIZES)

    def there(step: int, i: int) -> np.ndarray:
        return np.repeat(reached_at(step, i), SIZES)

    for r in range(STEPS):
        mixes = (r + 1) % every == 0 or r == STEPS - 1
        alone = in_place and not mixes
        for i in range(CLIENTS):
            own = {name: tensor[i] for name, tensor in state.items()}
            own["grad"].copy_(torch.tensor(np.where(there(r, i), gradient(r, i, own["theta"].numpy()), 0.0)))
            runs = steps[i].next(reached_at(r, i))
            local_step(rule, own, runs, slice(0, NUMEL), lr=LR, weight_decay=0.05, alone=alone)
        if mixes:
            w = torch.tensor(next(matrices), dtype=torch.float64)
            sent = {name: w @ state[name] for name in rule.travels}
            for name in rule.travels:
                rule.accept(state, name, sent[name])
        elif not alone:
            rule.stay(state)
        norm = state["grad"].norm(dim=1, keepdim=True) if rule.needs_norm else 0.0
        rule.finish(state, lr=LR, norm=norm, mixed=mixes)

    calls = [0] * CLIENTS

    def in_turn(i: int, x: np.ndarray) -> np.ndarray:
        calls[i] += 1
        return np.where(there(calls[i] - 1, i), gradient(calls[i] - 1, i, x), np.nan)

    c = Coefficients(method, signal, **COEFFICIENTS)
    expected = activation(
        c, start, in_turn, cycle(matrices_of("one_peer_exponential")), every=every, rates=[LR] * STEPS, decay=decay
    )
    theta = state["theta"].numpy()
    reference = np.stack([k.x for k in expected])
    np.testing.assert_allclose(theta, reference, rtol=0, atol=1e-9, err_msg=unlike_reference(method))
    never = slice(SIZES[0], SIZES[0] + SIZES[1])
    np.testing.assert_allclose(theta[:, never], start[:, never], rtol=0, atol=1e-9)
    assert np.abs(theta - start).max() > LR

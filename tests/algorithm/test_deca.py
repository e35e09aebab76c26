"""The inner step against NumPy and against torch's AdamW."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import UNIT

from deca_ds.algorithm.deca import SIGNALS, DecaRule


def one_step(rule, theta, g, m, v, mixed, inner, lr, decay=0.0):
    """The rule's step on copies; `mixed` None: no neighbour."""
    state = {"theta": theta.clone(), "grad": g.clone(), "m": m.clone(), "v": v.clone()}
    rule.local_step(state, inner=inner, lr=lr, decay=decay)
    half = state["grad"].clone()
    if mixed is None:
        rule.stay(state)
    else:
        rule.accept(state, "grad", mixed)
    norm = float(state["grad"].double().norm()) if rule.needs_norm else 0.0
    rule.finish(state, lr=lr, norm=norm, mixed=mixed is not None)
    return state["theta"], state["m"], state["v"], half


@pytest.mark.parametrize("signal", SIGNALS)
def test_every_signal_follows_its_equation(signal):
    rng = np.random.default_rng(0)
    theta, g, m, other = rng.normal(size=(4, 50))
    v = rng.random(50)
    lr, r, a1, a2, b1, b2, eps = 1e-2, 3, 0.8, 0.95, 0.7, 0.9, 1e-6
    m_half, v_half = a1 * m + (1 - a1) * g, a2 * v + (1 - a2) * g * g
    half = theta - lr * (m_half / (1 - a1 ** (r + 1))) / (np.sqrt(v_half / (1 - a2 ** (r + 1))) + eps)
    mixed = 0.25 * half + 0.75 * other
    h = {
        "none": None,
        "descent": theta - mixed,
        "transcribed": mixed - theta,
        "disagreement": half - mixed,
        "quasi_global": (theta - mixed) / lr,
        "quasi_global_norm": (theta - mixed) / (np.linalg.norm(theta - mixed) + eps),
        "trivial": theta - mixed,
        "fade": 0 * theta,
    }[signal]
    kept_m, kept_v = (m, v) if signal == "trivial" else (m_half, v_half)
    want_m = kept_m if h is None else b1 * kept_m + (1 - b1) * h
    want_v = kept_v if h is None else b2 * kept_v + (1 - b2) * h * h

    rule = DecaRule(a1, a2, eps, signal, b1, b2)
    to = lambda x: torch.tensor(x, dtype=torch.float64)  # noqa: E731
    got_theta, got_m, got_v, got_half = one_step(rule, to(theta), to(g), to(m), to(v), to(mixed), r, lr)
    np.testing.assert_allclose(got_half, half, rtol=1e-12)
    np.testing.assert_allclose(got_theta, mixed, rtol=1e-12)
    np.testing.assert_allclose(got_m, want_m, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(got_v, want_v, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_client_alone_is_adamw(decay):
    torch.manual_seed(0)
    start, gradients = torch.randn(1000, dtype=torch.float64), torch.randn(30, 1000, dtype=torch.float64)
    parameter = torch.nn.Parameter(start.clone())
    adamw = torch.optim.AdamW([parameter], lr=1e-2, weight_decay=decay)
    rule = DecaRule(signal="none")
    theta, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for inner, gradient in enumerate(gradients):
        parameter.grad = gradient.clone()
        adamw.step()
        theta, m, v, _ = one_step(rule, theta, gradient, m, v, None, inner, 1e-2, decay)
    torch.testing.assert_close(theta, parameter.detach(), rtol=0, atol=1e-12)


@settings(max_examples=30)
@given(signal=st.sampled_from(SIGNALS), cut=st.integers(1, 39), inner=st.integers(0, 100))
def test_the_step_is_elementwise(signal, cut, inner):
    """Working through a shard in chunks, or over more ranks, changes nothing but what a compiler may do at a chunk's
    end, where vectors no longer fit: a product and a sum are rounded once or twice."""
    generator = torch.Generator().manual_seed(inner)
    theta, g, m = torch.randn(3, 40, generator=generator)
    v = torch.rand(40, generator=generator)
    rule = DecaRule(signal=signal)
    whole = one_step(rule, theta, g, m, v, None, inner, 1e-3)
    parts = [one_step(rule, theta[s], g[s], m[s], v[s], None, inner, 1e-3) for s in (slice(0, cut), slice(cut, 40))]
    for index in range(4):
        together = torch.cat([part[index] for part in parts])
        torch.testing.assert_close(whole[index], together, rtol=8 * UNIT, atol=8 * UNIT)


def test_columns_of_stacked_clients_step_as_the_whole():
    """The kernel of torch.optim would run over the gap between two rows."""
    generator = torch.Generator().manual_seed(0)
    whole = dict(zip(("theta", "grad", "m"), torch.randn(3, 4, 64, generator=generator), strict=True))
    whole["v"] = torch.rand(4, 64, generator=generator)
    cut = {name: tensor.clone() for name, tensor in whole.items()}
    rule = DecaRule()
    rule.local_step(whole, inner=2, lr=1e-2, decay=0.1)
    for columns in (slice(0, 16), slice(16, 64)):
        rule.local_step({name: tensor[:, columns] for name, tensor in cut.items()}, inner=2, lr=1e-2, decay=0.1)
    for name, tensor in whole.items():
        torch.testing.assert_close(cut[name], tensor, rtol=8 * UNIT, atol=8 * UNIT)


def test_zero_learning_rate_has_a_finite_signal():
    x = torch.ones(3)
    _, m, v, _ = one_step(DecaRule(signal="quasi_global"), x, x, x, x, x, 0, 0.0)
    assert m.isfinite().all() and v.isfinite().all()


def test_unknown_signal_is_refused():
    with pytest.raises(ValueError, match=r"'momentum'.*descent"):
        DecaRule(signal="momentum")

"""Every method that is registered, by the contract and against the dense reference."""

from __future__ import annotations

from itertools import cycle

import numpy as np
import pytest
import torch
from golden import RUNS
from method_contract import (
    CLIENTS,
    CONTRACT,
    GRAPHS,
    LR,
    equals_the_dense_reference,
    matrices_of,
    problem,
    run,
    stacked_state,
)

from deca_ds.algorithm.deca import SIGNALS
from deca_ds.algorithm.methods import METHODS, build_rule
from deca_ds.config.schema import Config
from deca_ds.errors import ConfigError
from deca_ds.training.chosen_method import check_method, rule_of

EVERY_METHOD = [
    (name, signal)
    for name, method in METHODS.items()
    for signal in (SIGNALS if "signal" in method.coefficients else ["descent"])
]


@pytest.mark.parametrize("promise", CONTRACT, ids=lambda promise: promise.__name__)
@pytest.mark.parametrize(("method", "signal"), EVERY_METHOD)
def test_a_method_keeps_the_contract(method, signal, promise):
    promise(build_rule(method, signal=signal))


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize(("method", "signal"), EVERY_METHOD)
def test_a_method_equals_the_dense_reference(method, signal, graph, every):
    equals_the_dense_reference(method, signal, graph, every)


def test_the_digests_of_every_method_are_recorded():
    assert {changes.get("algorithm.method", "deca") for *_, changes in RUNS.values()} == METHODS.keys()


@pytest.mark.parametrize("graph", GRAPHS)
def test_the_mean_of_the_trackers_is_that_of_the_gradients(graph):
    start, gradient = problem(seed=2)
    rule = build_rule("gt-adam")
    state = stacked_state(rule, start)
    for r, w in zip(range(6), cycle(matrices_of(graph)), strict=False):
        for i in range(CLIENTS):
            state["grad"][i] = torch.tensor(gradient(r, i, state["theta"][i].numpy()))
        gradients = state["grad"].mean(0)
        rule.local_step(state, inner=r, lr=LR)
        torch.testing.assert_close(state["tracker"].mean(0), gradients, rtol=0, atol=1e-12)
        for name in rule.travels:
            rule.accept(state, name, torch.tensor(w) @ state[name])


@pytest.mark.parametrize("graph", GRAPHS)
def test_the_mean_of_gasloc_makes_diloco_s_outer_step(graph):
    """With gradients that do not depend on where a client is, and an outer learning rate of 1."""
    start, gradient = problem(seed=6)
    states = {}
    for method in ("gasloc", "diloco"):
        rule = build_rule(method, outer_lr=1.0, outer_momentum=0.5)
        states[method] = stacked_state(rule, start)
        run(rule, states[method], lambda r, i, x: gradient(r, i, start[i]), cycle(matrices_of(graph)), every=3)
    means = {method: state["theta"].mean(0) for method, state in states.items()}
    torch.testing.assert_close(means["gasloc"], means["diloco"], rtol=0, atol=1e-12)
    assert (means["gasloc"] - torch.tensor(start[0])).abs().max() > 12 * LR, "no momentum"
    assert (states["gasloc"]["theta"] - states["diloco"]["theta"]).abs().max() > LR


@pytest.mark.parametrize("graph", GRAPHS)
def test_the_mean_of_noloco_makes_a_heavy_ball_step_of_the_mean_movement(graph):
    """With gradients that do not depend on where a client is: on any graph that of clients which all average."""
    start, gradient = problem(seed=6)
    rule = build_rule("noloco", outer_lr=0.7, outer_momentum=0.5)
    means = {}
    for kind in (graph, "complete"):
        state = stacked_state(rule, start)
        run(rule, state, lambda r, i, x: gradient(r, i, start[i]), cycle(matrices_of(kind)), every=3)
        means[kind] = state["theta"].mean(0)
    torch.testing.assert_close(means[graph], means["complete"], rtol=0, atol=1e-12)


def test_qg_adam_needs_no_gradient_to_continue():
    """It keeps a vector of norm 1 in the direction of its last step, so one gradient suffices for an activation."""
    sizes = {}
    for method in ("qg-adam", "gossip-adam"):
        rule = build_rule(method)
        state = stacked_state(rule, np.zeros((1, 4)))
        state["grad"].copy_(torch.tensor([[1e-3, -2e-3, 4e-3, -8e-3]]))
        for r in range(24):
            before = state["theta"].clone()
            rule.local_step(state, inner=r, lr=LR)
            rule.accept(state, "grad", state["grad"].clone())  # all clients agree
            rule.finish(state, lr=LR, norm=state["grad"].norm(), mixed=True)
            sizes[method] = (before - state["theta"]).abs() / LR
            state["grad"].zero_()
    torch.testing.assert_close(sizes["qg-adam"], torch.ones(1, 4, dtype=torch.float64), rtol=0.1, atol=0)
    assert sizes["gossip-adam"].max() < 0.1


def test_a_rule_takes_its_own_coefficients_from_the_configuration():
    config = Config()
    config.algorithm.outer_lr, config.algorithm.b1, config.algorithm.a1 = 0.1, 0.2, 0.3
    taken = {}
    for config.algorithm.method in METHODS:
        rule = rule_of(config)
        taken[config.algorithm.method] = {key: getattr(rule, key, None) for key in ("outer_lr", "b1", "a1")}
    assert taken["deca"] == {"outer_lr": None, "b1": 0.2, "a1": 0.3}
    assert taken["diloco"] == {"outer_lr": 0.1, "b1": None, "a1": 0.3}
    assert taken["gasloc"] == {"outer_lr": None, "b1": None, "a1": 0.3}
    assert taken["adamw"] == {"outer_lr": None, "b1": None, "a1": 0.3}
    with pytest.raises(ValueError, match=r"'adam'.*gossip-adam"):
        build_rule("adam")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"algorithm.method": "adam"},
            r"algorithm.method = 'adam' is not known[\s\S]*one of deca, deca-ed, gossip-adam",
        ),
        ({"algorithm.signal": "momentum"}, r"algorithm.signal = 'momentum' is not known[\s\S]*one of none, descent"),
        (
            {"algorithm.method": "diloco", "algorithm.signal": "none"},
            r"'none' belongs to deca, deca-ed, not to diloco[\s\S]*or set algorithm.method=deca",
        ),
        ({"algorithm.method": "adamw"}, r"gossip.graph|layers_per_block=null, or algorithm.method=badam"),
        (
            {"algorithm.method": "badam", "blocks.layers_per_block": None},
            r"is null[\s\S]*set it to 1 or more, or algorithm.method=adamw",
        ),
        ({"algorithm.method": "local-adam"}, r"set gossip.every=2 or more, or algorithm.method=gossip-adam"),
        ({"algorithm.method": "dec-lora"}, r"trains all adapters at once[\s\S]*layers_per_block=null$"),
        ({"algorithm.method": "gt-adam", "gossip.clip_radius": 1.0}, r"sends grad and tracker"),
    ],
)
def test_a_method_that_does_not_fit_is_refused_by_what_its_row_says(keys, message):
    config = Config()
    for key, value in keys.items():
        section, _, name = key.partition(".")
        setattr(getattr(config, section), name, value)
    with pytest.raises(ConfigError, match=message):
        check_method(config)

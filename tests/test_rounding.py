"""Rounding stays within what rounding.py says, and tolerances that follow from it find small faults."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from dense_reference import load, model_gradient
from dense_runs import batches_of, dense, dense_model
from jobs import word_job
from rounding import MARGIN, Noise, assert_close

from deca_ds.config import load_config
from deca_ds.simulation.setup import build

STAR_OF_3 = np.array([[1 / 3, 1 / 3, 1 / 3], [1 / 3, 2 / 3, 0], [1 / 3, 0, 2 / 3]])


@pytest.fixture(scope="module")
def arguments(tiny_model, word_files, tmp_path_factory) -> list[str]:
    keys = {
        "run.output": tmp_path_factory.mktemp("rounding") / "run",
        "cluster.clients": 3,
        "gossip.graph": "star",
        "gossip.every": 2,
        "gossip.clip_radius": 0.05,
        "blocks.layers_per_block": 2,
        "algorithm.rounds": 1,
        "algorithm.inner_steps": 4,
        "algorithm.b1": 0.8,
        "algorithm.eps": 1e-2,
        "optimizer.weight_decay": 0.1,
        "evaluation.mean_model": False,
        "evaluation.max_examples": 1,
    }
    return word_job(tiny_model, word_files, **keys)


@pytest.fixture(scope="module")
def references(arguments):
    """What the dense reference has, without and with noise."""
    _, exact, noisy = dense(load_config(None, arguments), [STAR_OF_3])
    return exact, noisy


def compare(simulation, references) -> None:
    clients = simulation.clients
    start = {name: values.clone() for name, values in clients.parameters(0)}
    for _ in simulation.run(evaluate_first=False):
        pass
    assert_close([dict(clients.parameters(client)) for client in range(3)], *references, start, "fault")


def test_a_gradient_is_no_more_off_than_with_noise(arguments):
    """In float32, on this processor."""
    config = load_config(None, arguments)
    model, _ = dense_model(config)
    weights = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    single, noise = dense_model(config)[0].float(), Noise()
    load(single, weights)
    for batches in batches_of(config):
        for _ in range(4):
            batch = next(batches)
            exact, noisy = (
                model_gradient(model, held, batch)[0]
                for held in (weights, {name: noise.weights(values) for name, values in weights.items()})
            )
            for name, found in model_gradient(single, weights, batch)[0].items():
                tolerance = MARGIN * np.abs(noisy[name] - exact[name]).max()
                np.testing.assert_allclose(found, exact[name], rtol=0, atol=tolerance, err_msg=name)
                assert tolerance < 1e-3 * np.abs(exact[name]).max()


def wrong_correction(simulation, monkeypatch):
    step = type(simulation.rule).local_step
    monkeypatch.setattr(
        type(simulation.rule),
        "local_step",
        lambda *arguments, inner, **options: step(*arguments, inner=inner + 1, **options),
    )


def one_weight_off(simulation, monkeypatch):
    (matrix,) = simulation.mixing.matrices
    object.__setattr__(simulation.mixing, "matrices", (matrix + 1e-3 * np.array([[-1, 1, 0], [0, 0, 0], [0, 0, 0]]),))


def decay_of_norms(simulation, monkeypatch):
    block = simulation.clients.block

    def all_decay(index):
        theta, local_steps = block(index)
        for own in local_steps:
            own.decays = (True,) * len(own.decays)
        return theta, local_steps

    monkeypatch.setattr(simulation.clients, "block", all_decay)


def mean_of_means(simulation, monkeypatch):
    gradient = simulation.clients.gradient

    def each(index, client, micro_batches, out, clip_norm):
        total = torch.zeros_like(out)
        for batch in micro_batches:
            loss = gradient(index, client, [batch], out)
            total += out / len(micro_batches)
        out.copy_(total * min(1.0, clip_norm / float(total.norm())))
        return loss

    monkeypatch.setattr(simulation.clients, "gradient", each)


def stale_neighbour(simulation, monkeypatch):
    """Client 1 gets what client 0 held at the averaging before."""
    exchange, held = simulation.exchange, {}

    def stale(state, rows, mixed, step, lr):
        sent = state["grad"].clone()
        exchange(state, rows, mixed, step, lr)
        if mixed and step.inner > 1:
            state["theta"][1] += simulation.mixing.matrix(step.gossip)[1, 0] * (held["grad"][0] - sent[0])
        if mixed:
            held["grad"] = sent

    monkeypatch.setattr(simulation, "exchange", stale)


def changed_rule(**changes):
    return lambda simulation, _: setattr(simulation, "rule", replace(simulation.rule, **changes))


def changed_schedule(**changes):
    return lambda simulation, _: setattr(simulation, "schedule", replace(simulation.schedule, **changes))


def changed_config(section, **changes):
    def change(simulation, _):
        for key, value in changes.items():
            setattr(getattr(simulation.config, section), key, value)

    return change


FAULTS = {
    "bias is corrected for the next step": wrong_correction,
    "one mixing weight is 1e-3 off": one_weight_off,
    "b2 for b1": changed_rule(b1=0.99),
    "b1 for b2": changed_rule(b2=0.8),
    "a1 is 1e-3 off": changed_rule(a1=0.901),
    "a2 is 1e-3 off": changed_rule(a2=0.998),
    "eps is a hundredth off": changed_rule(eps=1.01e-2),
    "gossip is one step late": changed_schedule(gossip_every=3),
    "gradients are not clipped": changed_config("optimizer", clip_norm=0.0),
    "gradients are clipped a hundredth off": changed_config("optimizer", clip_norm=1.01),
    "learning rate is 1e-2 off": changed_config("optimizer", lr=0.00303),
    "weight decay is a tenth off": changed_config("optimizer", weight_decay=0.11),
    "radius is a hundredth off": changed_config("gossip", clip_radius=0.0505),
    "norms decay": decay_of_norms,
    "micro-batches count alike": mean_of_means,
    "a neighbour's block is stale": stale_neighbour,
}


def test_nothing_is_found_where_nothing_is_wrong(arguments, references):
    compare(build(load_config(None, arguments)), references)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_small_fault_is_found(arguments, references, monkeypatch, fault):
    simulation = build(load_config(None, arguments))
    FAULTS[fault](simulation, monkeypatch)
    with pytest.raises(AssertionError, match="from the reference"):
        compare(simulation, references)

"""What theory says about a graph, against averagings that are carried out."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from deca_ds.config.schema import GossipConfig
from deca_ds.gossip.schedule import build_mixing
from deca_ds.gossip.theory import (
    agreement,
    averagings_to_agree,
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
    assert np.abs(values).max() == pytest.approx(predicted_disagreement(schedule, lr, 3), rel=1e-6)


def test_isolated_clients_never_agree_and_those_of_a_complete_graph_after_one_averaging():
    isolated, complete = mixing("isolated", 3), mixing("complete", 3)
    assert averagings_to_agree(isolated) == math.inf == predicted_disagreement(isolated, 0.1, 1)
    assert averagings_to_agree(complete) == 1.0 and predicted_disagreement(complete, 0.1, 1) == 0.0


@pytest.mark.parametrize("clients", [3, 6, 8])
@pytest.mark.parametrize("graph", ["base", "one_peer_exponential", "random_pairs"])
def test_steps_between_the_averagings_of_a_period_keep_clients_apart_and_within_the_bound(graph, clients):
    """Each client steps into a direction of its own all the time, which a graph that averages exactly leaves, too."""
    schedule, lr = mixing(graph, clients), 0.01
    if schedule.spectral_gap == 0:
        pytest.skip("averagings alone do not bring these clients together")
    steps, values = 3 * lr * np.random.default_rng(0).choice([-1, 1], (clients, 50)), np.zeros((clients, 50))
    for t in range(20 * schedule.period):
        values = schedule.matrix(t) @ (values + steps)
    apart = np.sqrt(((values - values.mean(axis=0)) ** 2).mean(axis=0)).max()
    bound = predicted_disagreement(schedule, lr, 3)
    assert bound / 5 < apart <= bound


@pytest.mark.parametrize(
    ("graph", "clients", "told"),
    [
        ("ring", 1, "one client averages with nobody"),
        ("isolated", 3, "every client trains alone"),
        (
            "base",
            2,
            "after every averaging all clients have the same block, .* own set gossip.graph=ring gossip.weights=",
        ),
        ("ring", 3, "after every averaging all clients have the same block"),
        ("complete", 9, "after every averaging all clients have the same block"),
        ("one_peer_exponential", 8, "after every 3 averagings all clients have the same block, but for what"),
        ("base", 6, "after every 4 averagings all clients have the same block, but for what .* local steps in between"),
        ("ring", 4, "every averaging brings the clients' models 3.0 times closer together"),
        ("one_peer_exponential", 5, r"every 3 averagings bring the clients' models \d.\d times closer together"),
        ("ring", 64, "about 311 averagings bring the clients' models 2.7 times closer together"),
    ],
)
def test_what_averagings_do_is_told_in_words(graph, clients, told):
    assert re.match(told, agreement(mixing(graph, clients)))
    assert (
        clients == 1
        or graph == "isolated"
        or re.match(
            f"without the correction that the method adds, {told}", agreement(mixing(graph, clients), "correction")
        )
    )


@pytest.mark.parametrize("graph", ["base", "ring", "complete"])
def test_what_keeps_two_clients_apart_is_advised_and_does(graph):
    advised = agreement(mixing(graph, 2)).partition(" own set ")[2]
    keys = dict(key.removeprefix("gossip.").split("=") for key in advised.split())
    assert agreement(build_mixing(GossipConfig(**keys), 2, 0)).startswith("every averaging brings")


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
        ("base", 8, {"lr": 0.004}, []),
        ("base", 8, {"inner_steps": 2}, ["averaged 2 times while it is active, .* about 3 averagings to average all"]),
        ("base", 8, {"lr": 0.01}, ["for this learning rate: weights of different clients may stay 0.02 apart"]),
    ],
)
def test_slow_graphs_are_warned_of(graph, clients, changes, words):
    settings = {"inner_steps": 48, "gossip_every": 1, "lr": 5e-5, "weight_scale": 0.02} | changes
    found = slow_mixing(mixing(graph, clients), **settings)
    assert len(found) == len(words)
    for sentence, word in zip(found, words, strict=True):
        assert re.search(word, sentence) and ("gossip.graph" in sentence or "optimizer.lr" in sentence)

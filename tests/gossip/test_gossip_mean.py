"""The weighted mean: the dense product's bits, and no value that is not finite gets past it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deca_ds.gossip.mean import not_finite, weighted_mean

NOT_FINITE = [math.nan, math.inf, -math.inf]


def terms(clients: int, numel: int) -> dict[int, torch.Tensor]:
    return {j: torch.randn(numel, generator=torch.Generator().manual_seed(j)) for j in range(clients)}


@given(
    weights=st.lists(st.floats(1e-30, 1), min_size=2, max_size=4),
    numel=st.sampled_from([1, 7, 64, 1000, 5003]),
    client=st.integers(0, 3),
    place=st.integers(0, 10_000),
    value=st.sampled_from(NOT_FINITE),
    opposite=st.booleans(),
)
def test_no_value_that_is_not_finite_gets_past_the_mean(weights, numel, client, place, value, opposite):
    values = terms(len(weights), numel)
    assert weighted_mean(values, dict(enumerate(weights)), torch.empty(numel))
    client %= len(weights)
    values[client][place % numel] = value
    if opposite:  # of all infinities, those that could cancel
        values[(client + 1) % len(weights)][(place + 1) % numel] = -value
    assert not weighted_mean(values, dict(enumerate(weights)), torch.empty(numel))
    assert not_finite(values[client]) >= 1


@pytest.mark.parametrize("value", NOT_FINITE)
def test_a_value_that_is_not_finite_is_found_though_it_has_no_weight(value: float):
    values, out = terms(3, 50), torch.empty(50)
    values[1][7] = value
    assert not weighted_mean(values, {0: 0.5, 1: 0.0, 2: 0.5}, out)
    assert torch.equal(out, (values[0] * 0.5).add_(values[2], alpha=0.5)), "what has no weight is not in the mean"


def test_large_values_call_for_the_exact_count_which_lets_them_pass():
    values = {0: torch.full((50,), 3e38), 1: torch.full((50,), -1.0)}
    assert not weighted_mean(values, {0: 0.5, 1: 0.5}, torch.empty(50))
    assert [not_finite(term) for term in values.values()] == [0, 0]


def test_the_count_is_exact():
    values = torch.ones(100)
    values[[3, 50, 99]] = torch.tensor(NOT_FINITE)
    assert not_finite(values) == 3 and not_finite(torch.empty(0)) == 0


def test_an_empty_part_has_a_finite_mean():
    assert weighted_mean(terms(2, 0), {0: 0.5, 1: 0.5}, torch.empty(0))

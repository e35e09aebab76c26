"""A digest of a parameter from slices of any size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deca_ds.training import compare_clients
from deca_ds.training.compare_clients import weighted_sum

NUMEL = 101
X = torch.randn(NUMEL, generator=torch.Generator().manual_seed(0))


def of_slices(x: torch.Tensor, ranks: int) -> int:
    size = -(-len(x) // ranks)
    pieces = ((start, x[start : start + size]) for start in range(0, len(x), size))
    return sum(weighted_sum("a", start, piece) for start, piece in pieces) % 2**64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [2, 3, 7, 100])
def test_the_digest_does_not_depend_on_the_slices(dtype, ranks, monkeypatch):
    x = X.to(dtype)
    assert of_slices(x, ranks) == weighted_sum("a", 0, x)
    monkeypatch.setattr(compare_clients, "PIECE", 10)
    assert of_slices(x, ranks) == of_slices(x, 1)


@given(st.integers(0, NUMEL - 1), st.floats(width=32, allow_nan=False))
def test_one_changed_value_changes_the_digest(place, value):
    changed = X.clone()
    changed[place] = value
    same = torch.equal(changed.view(torch.int32), X.view(torch.int32))
    assert (weighted_sum("a", 0, changed) == weighted_sum("a", 0, X)) == same


def test_order_and_name_change_the_digest():
    assert weighted_sum("a", 0, X) != weighted_sum("a", 0, X.flip(0)) != weighted_sum("b", 0, X.flip(0))

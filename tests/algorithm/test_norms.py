import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deca_ds.algorithm.norms import squared_norm


@pytest.mark.parametrize("numel", [0, 1, 4095, 4096, 3_000_001])
def test_the_squared_norm_is_the_float64_sum_of_squares(numel):
    values = torch.randn(numel, generator=torch.Generator().manual_seed(0)) / 3
    found = squared_norm(values)
    assert found.dtype == torch.float64 and found.shape == ()
    assert float(found) == pytest.approx(float(values.double().square().sum()), rel=1e-6)


def test_long_sums_do_not_lose_small_terms():
    """Added up in float32, terms of 1 behind a sum of 2^24 vanish."""
    assert float(squared_norm(torch.ones(2**25))) == pytest.approx(2**25, rel=1e-7)


def test_no_copy_is_made():
    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if out.untyped_storage().data_ptr() != values.untyped_storage().data_ptr():
                made.append(out.nbytes)
            return out

    made, values = [], torch.ones(2**20 + 5)
    with Sizes():
        squared_norm(values)
    assert made and max(made) <= values.nbytes / 2**10


def test_a_value_that_is_not_finite_makes_the_norm_not_finite():
    for bad in (float("nan"), float("inf")):
        values = torch.ones(5000)
        values[17] = bad
        assert not torch.isfinite(squared_norm(values))

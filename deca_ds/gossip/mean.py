"""The weighted mean of what clients hold, and whose values are not finite: arithmetic on flat float32 tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def weighted_mean(terms: Mapping[int, Tensor], weights: Mapping[int, float], out: Tensor) -> bool:
    """Set out <- sum_j weights[j] terms[j], in ascending order of j, without terms whose weight is zero.

    terms: by client, flat float32, on the device of `out`, which is like them. Returns whether all terms are known to
    be finite: a value that is not makes the mean, and the mean's sum, not finite either. So do values that are large,
    so False calls for `not_finite`. On a GPU it returns when the mean has been computed.
    """
    averaged = sorted(j for j in terms if weights[j] > 0)
    for number, j in enumerate(averaged):
        if number == 0:
            torch.mul(terms[j], weights[j], out=out)
        else:
            out.add_(terms[j], alpha=weights[j])
    checked = [out, *(term for j, term in terms.items() if j not in averaged)]
    return all(math.isfinite(float(each.sum())) for each in checked)


def not_finite(values: Tensor) -> int:
    """Count the values that are not finite. Their sum tells at once if there are none, unless they are large."""
    return 0 if math.isfinite(float(values.sum())) else int(values.numel() - values.isfinite().sum())

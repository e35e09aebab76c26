"""The contraction of a rule's averagings: the part of the clients' distance to their mean that each of them leaves. It
tells, before a run, whether a graph suits a rule; local steps are left out of it.

Matrices are the W of one period of averagings, each [n, n], float64 and doubly stochastic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

NEVER = 1 - 1e-9  # what an averaging leaves, if averagings do not bring clients together
_AVERAGINGS = 500  # of which half of a computed rate is the mean, at least

# makes of W, the clients' parameters x and what the rule keeps beside them, (n,) each, both after an averaging; what is
# kept does not change where all x grow by the same
Averaging: TypeAlias = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def contraction(matrices: Sequence[Tensor], averaging: Averaging) -> float:
    """Return what an averaging leaves of the clients' distance to their mean, in the long run, without local steps.

    From a drawn start, the geometric mean over the second half of some thousand averagings, in whole periods; 0.0 where
    the clients agree.
    """
    x = torch.randn(len(matrices[0]), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kept = torch.zeros_like(x)
    together = all(bool(_joined(matrix).all()) for matrix in matrices)  # what all keep alike does not part them
    half, factors = len(matrices) * math.ceil(_AVERAGINGS / len(matrices)), []
    for t in range(2 * half):
        x, kept = averaging(matrices[t % len(matrices)], x - x.mean(), kept)
        distance = math.hypot(float((x - x.mean()).norm()), float((kept - kept.mean()).norm()))
        if distance < 1e-12:
            return 0.0
        x, kept = x / distance, (kept - kept.mean() if together else kept) / distance
        factors.append(distance)
    return math.exp(sum(map(math.log, factors[half:])) / half)


def with_momentum(momentum: float) -> Averaging:
    """Return x_(t+1) = W x_t + mu d_t, which keeps d_(t+1) = x_(t+1) - x_t: the heavy ball method.

    Of one symmetric W an eigenvalue w makes the roots of z^2 - (w + mu) z + mu, of size sqrt(mu) from mu = (1 -
    sqrt(1 - w))^2 on. A client without a neighbour keeps both.
    """

    def averaging(w: Tensor, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        moved = torch.where(_joined(w), w @ x + momentum * d, x)
        return moved, torch.where(_joined(w), moved - x, d)

    return averaging


def with_outer_step(lr: float, momentum: float, *, nesterov: bool) -> Averaging:
    """Return x_(t+1) = x_t - lr b_(t+1), which keeps b_(t+1) = mu b_t + x_t - W x_t, or, with Nesterov's momentum,
    x_(t+1) = x_t - lr (x_t - W x_t + mu b_(t+1)). A client without a neighbour keeps both."""

    def averaging(w: Tensor, x: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        delta = x - w @ x
        after = torch.where(_joined(w), momentum * b + delta, b)
        step = delta + momentum * after if nesterov else after
        return torch.where(_joined(w), x - lr * step, x), after

    return averaging


def with_correction(correction: float) -> Averaging:
    """Return x_(t+1) = (I + W) / 2 (x_t + c d_t), which keeps d_(t+1) = x_(t+1) - x_t: exact diffusion. A client
    without a neighbour keeps both."""

    def averaging(w: Tensor, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        sent = x + correction * d
        moved = torch.where(_joined(w), (sent + w @ sent) / 2, x)
        return moved, torch.where(_joined(w), moved - x, d)

    return averaging


def _joined(w: Tensor) -> Tensor:
    return w.diagonal() < 1

"""The contraction of a rule's averagings: the part of the clients' distance to their mean that each of them leaves. It
tells, before a run, whether a graph suits a rule; local steps are left out of it.

Matrices are the W of one period of averagings, each [n, n], float64 and doubly stochastic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_AVERAGINGS = 100  # of which half of a computed rate is the mean, at least


def contraction_with_momentum(matrix: Tensor, momentum: float) -> float:
    """Return what an averaging with momentum leaves of the clients' distance to their mean, in the long run at worst.

    matrix: a symmetric W. Without local steps x_(t+1) = W x_t + mu (x_t - x_(t-1)), the heavy ball method, makes of an
    eigenvalue w the larger root of z^2 - (w + mu) z + mu: sqrt(mu) from mu = (1 - sqrt(1 - w))^2 on.
    """
    trace = torch.linalg.eigvalsh(matrix - 1.0 / len(matrix)) + momentum
    root = (trace**2 - 4 * momentum).clamp(min=0.0).sqrt()
    return float(((trace.abs() + root) / 2).clamp(min=math.sqrt(momentum)).max())


def contraction_with_correction(matrices: Sequence[Tensor], correction: float) -> float:
    """Return what an averaging of exact diffusion leaves of the clients' distance to their mean, in the long run.

    Without local steps d_t = x_t - x_(t-1), and x_(t+1) = (I + W) / 2 (x_t + c d_t). From a drawn start, the geometric
    mean over the second half of some two hundred averagings, in whole periods; 0.0 where the clients agree.
    """
    start = torch.randn(len(matrices[0]), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, change = start, torch.zeros_like(start)
    half, factors = len(matrices) * math.ceil(_AVERAGINGS / len(matrices)), []
    for t in range(2 * half):
        x = x - x.mean()
        sent = x + correction * change
        moved = (sent + matrices[t % len(matrices)] @ sent) / 2
        change = moved - x
        distance = math.hypot(float((moved - moved.mean()).norm()), float(change.norm()))
        if distance < 1e-12:
            return 0.0
        x, change = moved / distance, change / distance
        factors.append(distance)
    return math.exp(sum(map(math.log, factors[half:])) / half)

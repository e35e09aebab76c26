"""How far apart rounding may take two computations of one run. Every tolerance of trained numbers comes from here.

A float32 sum of n terms is off by up to n 2^-24 of what the terms' sizes add up to, in any order; instruction sets,
threads, ranks and micro-batches are orders. A product with a weight matrix is therefore exact for weights that are off
by up to n 2^-24 of themselves (backward error: Higham, Accuracy and Stability of Numerical Algorithms, 2002, 3.5).

What becomes of that differs: where a gradient is near zero, an Adam step makes up to lr delta / eps of an error delta,
and later gradients, signals and averages carry it on. No fixed tolerance is right for every method, length and
parameter, so the reference itself tells: it runs again with every gradient taken at weights that are off by as much, at
random, and with every local step rounded. What comes of it, times MARGIN, may be rounding. Noise on the gradients would
not do: the errors of one pass belong together and lie where the loss is steep, errors of single elements cancel.

Runs differ from the reference by up to a fifth of a tolerance, with AVX-512, with AVX2 and without fused operations.
Tests choose an eps of about a gradient's size, 1e-2, with which errors hardly grow: tolerances are then some 1e-6, and
test_rounding.py shows which faults they find, such as a mixing weight that is 1e-3 off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

UNIT = 2.0**-24  # a float32 operation's result is off by up to this part of itself
# Weights, in parts of themselves: the tiny model's sums have up to 64 terms (4 x 16 tokens, 51 words, 29 hidden units).
WEIGHTS = 64 * UNIT
LOSS = 64 * UNIT  # a mean loss, in parts of itself
PARAMETER = 4 * UNIT  # a parameter, in parts of itself, by a local step and an averaging: an operation or two each
MARGIN = 8.0  # for what a single draw of the noise leaves open: rounding errors need not be independent
SHARPEST = 0.02  # a tolerance may be at most this part of what training has changed

Parameters = Mapping[str, Any]  # NumPy arrays or tensors by name


class Noise:
    """Random errors within the bounds above."""

    def __init__(self, seed: int = 0):
        self._random = np.random.default_rng(seed)

    def weights(self, values: np.ndarray) -> np.ndarray:
        """Those that a gradient is computed with."""
        return values * (1 + WEIGHTS * self._random.uniform(-1, 1, size=values.shape))

    def parameters(self, values: np.ndarray) -> np.ndarray:
        """What a local step has left."""
        return values * (1 + PARAMETER * self._random.uniform(-1, 1, size=values.shape))


def array(values: Any) -> np.ndarray:
    """In float64."""
    return values.double().numpy() if isinstance(values, torch.Tensor) else np.asarray(values, dtype=np.float64)


def assert_close(
    got: Sequence[Parameters], exact: Sequence[Parameters], noisy: Sequence[Parameters], start: Parameters, where: str
) -> None:
    """Clients' parameters are the reference's to rounding, and rounding hides nothing.

    noisy: the reference's with noise. start: every client's before training. What was not trained is equal to the bit.
    """
    for name in exact[0]:
        values, found = (np.stack([array(client[name]) for client in clients]) for clients in (exact, got))
        tolerance = MARGIN * np.abs(np.stack([array(client[name]) for client in noisy]) - values).max()
        changed = np.abs(values - array(start[name])).max()
        assert tolerance <= SHARPEST * changed, (
            f"{where}, {name}: {tolerance:.2g} for rounding, training does {changed}"
        )
        off = np.abs(found - values).max(axis=tuple(range(1, values.ndim)))
        message = f"{where}, {name}: {off} from the reference, client by client; {tolerance:.2g} may be rounding"
        assert (off <= tolerance).all(), message

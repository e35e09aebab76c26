"""Self-centred clipping of what neighbours send (He, Karimireddy, Jaggi, arXiv 2202.01545, ClippedGossip):

    x_i <- sum_j w_ij ( x_i + clip(x_j - x_i, tau) )        clip(z, tau) = min(1, tau / |z|_2) z

The norm is over the whole active block, all shards of the client together, as in the paper for the whole model. The
paper lets tau vary with client and step; ours is one number. The same mean with other weights is

    x_i <- sum_j (w_ij s_j) x_j + (w_ii + sum_j w_ij (1 - s_j)) x_i        s_j = min(1, tau / |x_j - x_i|_2)

A row still sums to 1. Where W is symmetric, both ends of an edge clip the same difference alike, so that the clients'
mean stays, as long as all follow the rule. Where W is not (one_peer_exponential, a directed matrix), its columns do not
sum to 1 any more and clipping moves the mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deca_ds.algorithm import squared_norm


@dataclass(frozen=True)
class Clip:
    """How neighbours are clipped. radius: tau. client_sum: sums a number over the ranks of this client, all of which
    call `distances`, also those whose shard is empty."""

    radius: float
    client_sum: Callable[[float], float] = float

    def distances(self, squares: Mapping[int, float]) -> dict[int, float]:
        """Return j -> |x_j - x_i|_2 of every neighbour. squares: j -> the square of it over this rank's shard alone."""
        return {j: self.client_sum(square) ** 0.5 for j, square in squares.items()}


def clipped_weights(
    weights: Mapping[int, float], client: int, distances: Mapping[int, float], radius: float
) -> dict[int, float]:
    """Return the row of weights that averages clipped neighbours: j -> weight, with one for `client` itself.

    weights: j -> w_ij, all that are not zero. distances: j -> |x_j - x_i|_2 of every neighbour. radius: tau.
    """
    scales = {j: min(1.0, radius / distance) if distance > 0 else 1.0 for j, distance in distances.items()}
    kept = sum(weights[j] * (1 - scale) for j, scale in scales.items())
    clipped = {j: weights[j] * scale for j, scale in scales.items()}
    return clipped | {client: weights.get(client, 0.0) + kept}


def squared_distance(theirs: Tensor, own: Tensor) -> float:
    """Return |x_j - x_i|^2 of a chunk. theirs, own: 1-D float32."""
    difference = theirs - own
    square = float(squared_norm(difference))
    return square if math.isfinite(square) else float(torch.linalg.vector_norm(difference, dtype=torch.float64)) ** 2

"""What an averaging makes of all clients' values at once, as messages between them would; see deca_ds/gossip."""

from __future__ import annotations

import torch
from torch import Tensor

from deca_ds.algorithm import State
from deca_ds.config.schema import GossipConfig
from deca_ds.gossip import MixingSchedule
from deca_ds.gossip.clip import clipped_weights
from deca_ds.gossip.codec import CODECS


def means_of(values: State, mixing: MixingSchedule, t: int, config: GossipConfig) -> dict[str, Tensor]:
    """Return what averaging t makes of what travels, [n, numel] each; see gossip/codec.py."""
    codec = CODECS[config.wire]
    coded = {name: codec.coded(each) for name, each in values.items()}
    w = _weights(next(iter(coded.values())), mixing, t, config.clip_radius)
    means = {name: w @ each for name, each in coded.items()}
    if not codec.exact:
        for name, mean in means.items():
            mean.add_(values[name] - coded[name])
    return means


def _weights(sent: Tensor, mixing: MixingSchedule, t: int, radius: float | None) -> Tensor:
    """Return the matrix [n, n] of averaging t; with clipping it depends on the parameters [n, numel]."""
    w = mixing.matrix(t)
    if radius is not None:
        w = w.copy()
        for i, row in enumerate(mixing.matrix(t)):
            sources = mixing.sources(i, t)
            distances = {j: float(torch.linalg.vector_norm(sent[j] - sent[i], dtype=torch.float64)) for j in sources}
            clipped = clipped_weights({j: row[j] for j in (*sources, i)}, i, distances, radius)
            w[i, list(clipped)] = list(clipped.values())
    return torch.tensor(w, dtype=torch.float32)

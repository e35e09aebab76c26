"""DECA written a second time: dense, in one process, in NumPy, straight from the equations.

Nothing of deca_ds.algorithm, gossip or engine is used. torch serves for one thing only, the gradient of a whole model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F

Parameters = dict[str, np.ndarray]


def gradient(model: torch.nn.Module, parameters: Parameters, batch: dict) -> tuple[Parameters, float]:
    """Gradient of the mean loss over the batch's target tokens, float64 copies, and the loss."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(parameters[name]))
    model.zero_grad()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    loss.backward()
    return {name: p.grad.double().numpy() for name, p in model.named_parameters()}, float(loss)


def signal_of(kind: str, theta, half, mixed, lr: float, eps: float, names) -> Parameters | None:
    if kind == "none":
        return None
    difference = {name: theta[name] - mixed[name] for name in names}
    if kind in ("descent", "trivial"):
        return difference
    if kind == "transcribed":
        return {name: -difference[name] for name in names}
    if kind == "disagreement":
        return {name: half[name] - mixed[name] for name in names}
    if kind == "quasi_global":
        return {name: difference[name] / lr for name in names}
    norm = math.sqrt(sum(float((difference[name] ** 2).sum()) for name in names))
    return {name: difference[name] / (norm + eps) for name in names}


def train(
    model: torch.nn.Module,
    blocks: Sequence[Sequence[str]],
    batches: Sequence[Iterator[dict]],
    matrices: Sequence[np.ndarray],
    *,
    rounds: int,
    inner_steps: int,
    every: int,
    signal: str,
    a1: float,
    a2: float,
    b1: float,
    b2: float,
    eps: float,
    lr: float,
    decay: float,
    clip: float,
) -> tuple[list[Parameters], list[list[float]]]:
    """Final parameters of every client and its loss at every inner step. blocks in the order in which they train."""
    clients = range(len(batches))
    start = {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}
    theta = [{name: values.copy() for name, values in start.items()} for _ in clients]
    losses: list[list[float]] = [[] for _ in clients]
    averagings = 0
    for _ in range(rounds):
        for names in blocks:
            m = [{name: np.zeros_like(start[name]) for name in names} for _ in clients]
            v = [{name: np.zeros_like(start[name]) for name in names} for _ in clients]
            for r in range(inner_steps):
                half: list[Parameters] = []
                kept = [(dict(m[i]), dict(v[i])) for i in clients]
                for i in clients:
                    g, loss = gradient(model, {k: x.astype(np.float32) for k, x in theta[i].items()}, next(batches[i]))
                    losses[i].append(loss)
                    norm = math.sqrt(sum(float((g[name] ** 2).sum()) for name in names))
                    scale = clip / norm if 0 < clip < norm else 1.0
                    half.append({})
                    for name in names:
                        m[i][name] = a1 * m[i][name] + (1 - a1) * scale * g[name]
                        v[i][name] = a2 * v[i][name] + (1 - a2) * (scale * g[name]) ** 2
                        m_hat, v_hat = m[i][name] / (1 - a1 ** (r + 1)), v[i][name] / (1 - a2 ** (r + 1))
                        shrink = decay if theta[i][name].ndim >= 2 else 0.0
                        half[i][name] = theta[i][name] - lr * (m_hat / (np.sqrt(v_hat) + eps) + shrink * theta[i][name])
                    if signal == "trivial":
                        m[i], v[i] = kept[i]
                gossips = (r + 1) % every == 0 or r == inner_steps - 1
                w = matrices[averagings % len(matrices)] if gossips else np.eye(len(clients))
                averagings += gossips
                for i in clients:
                    mixed = {name: sum(w[i, j] * half[j][name] for j in clients) for name in names}
                    h = signal_of(signal, theta[i], half[i], mixed, lr, eps, names) if w[i, i] < 1 else None
                    for name in names:
                        theta[i][name] = mixed[name]
                        if h is not None:
                            m[i][name] = b1 * m[i][name] + (1 - b1) * h[name]
                            v[i][name] = b2 * v[i][name] + (1 - b2) * h[name] ** 2
    return theta, losses

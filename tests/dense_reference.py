"""Every method written a second time: dense, in one process, in NumPy float64, straight from the equations.

Nothing of deca_ds.algorithm, gossip or engine is used. torch serves for one thing only, the gradient of a whole model,
in float64 too (but for the norms of transformers, which compute in float32 whatever they are given).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from rounding import Noise

Parameters = dict[str, np.ndarray]
# client, its block (numel,) -> gradient of the same shape, NaN for parameters that got none
Gradient = Callable[[int, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Coefficients:
    method: str = "deca"
    signal: str = "descent"
    a1: float = 0.9
    a2: float = 0.999
    b1: float = 0.9
    b2: float = 0.99
    correction: float = 0.9
    eps: float = 1e-8
    outer_lr: float = 0.7
    outer_momentum: float = 0.9
    clip_radius: float | None = None


def signal_of(c: Coefficients, theta, half, mixed, lr: float) -> np.ndarray:
    if c.signal in ("descent", "trivial"):
        return theta - mixed
    if c.signal == "transcribed":
        return mixed - theta
    if c.signal == "disagreement":
        return half - mixed
    if c.signal == "fade":
        return np.zeros_like(theta)
    if c.signal == "quasi_global":
        return (theta - mixed) / lr
    return (theta - mixed) / (np.linalg.norm(theta - mixed) + c.eps)


# The end of a client's inner step, by method: what it makes of the averaging. k: the client, which holds x before the
# step, half after its local step, and m_half and v_half then. alone: nobody was averaged with.


def adam(c: Coefficients, k: SimpleNamespace, mixed: np.ndarray, alone: bool, lr: float) -> None:
    k.x, k.m, k.v = mixed, k.m_half, k.v_half


def deca(c: Coefficients, k: SimpleNamespace, mixed: np.ndarray, alone: bool, lr: float) -> None:
    if c.signal != "trivial":
        k.m, k.v = k.m_half, k.v_half
    if not alone and c.signal != "none":
        h = signal_of(c, k.x, k.half, mixed, lr)
        k.m, k.v = c.b1 * k.m + (1 - c.b1) * h, c.b2 * k.v + (1 - c.b2) * h**2
    k.x = mixed


def deca_ed(c: Coefficients, k: SimpleNamespace, mixed: np.ndarray, alone: bool, lr: float) -> None:
    half = k.half - c.correction * k.d  # k.half was sent
    if not alone:
        mixed = (k.half + mixed) / 2
        k.d = mixed - half
    deca(c, k, half if alone else mixed, alone, lr)


def qg_adam(c: Coefficients, k: SimpleNamespace, mixed: np.ndarray, alone: bool, lr: float) -> None:
    d = (k.x - mixed) / (np.linalg.norm(k.x - mixed) + c.eps)
    k.x, k.m, k.v = mixed, c.a1 * k.m + (1 - c.a1) * d, c.a2 * k.v + (1 - c.a2) * d**2


def diloco(c: Coefficients, k: SimpleNamespace, mixed: np.ndarray, alone: bool, lr: float) -> None:
    adam(c, k, mixed, alone, lr)
    if not alone:
        delta = k.anchor - mixed
        k.b = c.outer_momentum * k.b + delta
        k.x = k.anchor - c.outer_lr * (delta + c.outer_momentum * k.b)
        k.anchor = k.x.copy()


def noloco(c: Coefficients, k: SimpleNamespace, mixed: np.ndarray, alone: bool, lr: float) -> None:
    adam(c, k, mixed, alone, lr)
    if not alone:
        k.b = c.outer_momentum * k.b + (k.anchor - mixed)
        k.x = k.anchor - c.outer_lr * k.b
        k.anchor = k.x.copy()


def gasloc(c: Coefficients, k: SimpleNamespace, mixed: np.ndarray, alone: bool, lr: float) -> None:
    adam(c, k, mixed, alone, lr)
    if not alone:
        k.x, k.y = mixed + c.outer_momentum * (k.half - k.y), k.half


# all others: adam
ENDS = {
    "deca": deca, "deca-ed": deca_ed, "qg-adam": qg_adam, "diloco": diloco, "noloco": noloco, "gasloc": gasloc
}  # fmt: skip
TRACKS = ("gt-adam",)  # whose gradients are tracked: s is averaged, too


def average(w: np.ndarray, x: np.ndarray, radius: float | None) -> np.ndarray:
    """W x, or ClippedGossip (arXiv 2202.01545) to the letter. x: [n, numel]."""
    if radius is None:
        return w @ x
    mixed = np.zeros_like(x)
    for i, own in enumerate(x):
        for weight, other in zip(w[i], x, strict=True):
            norm = np.sqrt(((other - own) ** 2).sum())
            mixed[i] += weight * (own + (min(1.0, radius / norm) if norm > 0 else 1.0) * (other - own))
    return mixed


def activation(
    c: Coefficients,
    theta: np.ndarray,
    gradient: Gradient,
    matrices: Iterator[np.ndarray],
    *,
    every: int,
    rates: Sequence[float],
    decay: np.ndarray | float = 0.0,
    noise: Noise | None = None,
) -> list[SimpleNamespace]:
    """One block from its opening to its closing. theta: [n, numel]. matrices: the next averaging's W, again and again.
    rates: the learning rate of each inner step. noise: on what local steps leave.

    Returns the clients' states; x is what they hold in the end.
    """
    n, numel = theta.shape
    zero = lambda: np.zeros(numel)  # noqa: E731
    clients = [SimpleNamespace(x=theta[i].copy(), m=zero(), v=zero(), s=zero(), g=zero(), b=zero()) for i in range(n)]
    for client in clients:
        client.anchor, client.y, client.made, client.d = client.x.copy(), client.x.copy(), zero(), zero()
    for r, lr in enumerate(rates):
        for i, k in enumerate(clients):
            g = gradient(i, k.x)
            there = ~np.isnan(g)
            k.made += there
            g = np.where(there, g, 0.0)
            if c.method in TRACKS:
                k.s, k.g = k.s + g - k.g, g
                g = k.s
            k.m_half = np.where(there, c.a1 * k.m + (1 - c.a1) * g, k.m)
            k.v_half = np.where(there, c.a2 * k.v + (1 - c.a2) * g**2, k.v)
            made = np.maximum(k.made, 1)
            m_hat, v_hat = k.m_half / (1 - c.a1**made), k.v_half / (1 - c.a2**made)
            k.half = np.where(there, k.x - lr * (m_hat / (np.sqrt(v_hat) + c.eps) + decay * k.x), k.x)
            if c.method == "deca-ed":
                k.half = k.half + c.correction * k.d
            if noise is not None:
                k.half = np.where(there, noise.parameters(k.half), k.half)
        gossips = (r + 1) % every == 0 or r == len(rates) - 1
        w = next(matrices) if gossips else np.eye(n)
        mixed = average(w, np.stack([k.half for k in clients]), c.clip_radius)
        tracked = w @ np.stack([k.s for k in clients])
        for i, k in enumerate(clients):
            k.s = tracked[i]
            ENDS.get(c.method, adam)(c, k, mixed[i], not w[i, i] < 1, lr)
    return clients


@torch.no_grad()
def load(model: torch.nn.Module, parameters: Parameters) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.from_numpy(parameters[name]))


def model_gradient(model: torch.nn.Module, parameters: Parameters, batch: dict) -> tuple[Parameters, float]:
    """Gradient of the mean loss over the batch's target tokens, and the loss."""
    load(model, parameters)
    model.zero_grad()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    loss.backward()
    return {name: p.grad.numpy().copy() for name, p in model.named_parameters()}, float(loss.detach())


def train(
    c: Coefficients,
    model: torch.nn.Module,
    blocks: Sequence[Sequence[str]],
    batches: Sequence[Iterator[dict]],
    matrices: Sequence[np.ndarray],
    *,
    rounds: int,
    inner_steps: int,
    every: int,
    rates: Sequence[float],
    decay: float,
    clip: float,
    noise: Noise | None = None,
) -> list[Parameters]:
    """Final parameters of every client. blocks: names, in the order in which they train; a single one stays active.

    model: float64; it is left as it comes. rates: the learning rate of each inner step. noise: see rounding.py.
    """
    start = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    models = [{name: values.copy() for name, values in start.items()} for _ in batches]
    endless, still = cycle(matrices), iter(rates)
    if len(blocks) == 1:
        rounds, inner_steps = 1, rounds * inner_steps
    for _ in range(rounds):
        for names in blocks:
            shapes = [start[name].shape for name in names]
            cuts = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
            flat = lambda arrays, names=names: np.concatenate([arrays[name].ravel() for name in names])  # noqa: E731
            shrink = np.concatenate([np.full(math.prod(s), decay if len(s) >= 2 else 0.0) for s in shapes])

            def place(i: int, x: np.ndarray, names=names, shapes=shapes, cuts=cuts) -> None:
                for name, shape, values in zip(names, shapes, np.split(x, cuts), strict=True):
                    models[i][name] = values.reshape(shape)

            def gradient(i: int, x: np.ndarray, place=place, flat=flat) -> np.ndarray:
                place(i, x)
                weights = models[i]
                if noise is not None:
                    weights = {name: noise.weights(values) for name, values in weights.items()}
                g = flat(model_gradient(model, weights, next(batches[i]))[0])
                norm = np.linalg.norm(g)
                return g * (clip / norm) if 0 < clip < norm else g

            theta = np.stack([flat(parameters) for parameters in models])
            ended = activation(
                c,
                theta,
                gradient,
                endless,
                every=every,
                rates=list(islice(still, inner_steps)),
                decay=shrink,
                noise=noise,
            )
            for i, client in enumerate(ended):
                place(i, client.x)
    load(model, start)
    return models

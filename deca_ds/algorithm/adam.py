"""The local step of AdamW (Loshchilov and Hutter, arXiv 1711.05101), which most methods make before they average.

m = a1 m + (1 - a1) g               v = a2 v + (1 - a2) g*g
theta_half = theta - lr ( m / (1 - a1^(r+1)) / (sqrt(v / (1 - a2^(r+1))) + eps) + decay theta )
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.optim.adamw import adamw

from deca_ds.algorithm.rule import Rule, State


@dataclass(frozen=True)
class AdamRule(Rule):
    """A rule whose local step is AdamW's. a1, a2: decay of the moments in it. State: m, v, and what a subclass adds."""

    buffers: ClassVar[tuple[str, ...]] = ("m", "v")

    a1: float = 0.9
    a2: float = 0.999
    eps: float = 1e-8

    @torch.no_grad()
    def local_step(self, state: State, *, inner: int, lr: float, decay: float = 0.0, alone: bool = False) -> None:
        """See Rule. torch's fused kernel reads and writes each element once, but takes for granted that there are no
        gaps between them: it gets a stacked state row by row."""
        if alone:
            gradient, stepped = state["grad"], state["theta"]
        else:
            gradient = state["grad"].clone()
            stepped = state["grad"].copy_(state["theta"])
        params, grads, m, v = (list(torch.atleast_2d(x)) for x in (stepped, gradient, state["m"], state["v"]))
        made = [torch.full((), float(inner), device=stepped.device) for _ in params]
        adamw(
            params, grads, m, v, [], made, lr=lr, beta1=self.a1, beta2=self.a2, eps=self.eps, weight_decay=decay,
            fused=True, amsgrad=False, maximize=False,
        )  # fmt: skip

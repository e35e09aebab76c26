"""The local step of AdamW (Loshchilov and Hutter, arXiv 1711.05101), which most methods make before they average.

m = a1 m + (1 - a1) g               v = a2 v + (1 - a2) g*g
theta_half = theta - lr ( m / (1 - a1^(r+1)) / (sqrt(v / (1 - a2^(r+1))) + eps) + decay theta )
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deca_ds.algorithm.rule import Rule, State


@dataclass(frozen=True)
class AdamRule(Rule):
    """A rule whose local step is AdamW's. a1, a2: decay of the moments in it. State: m, v, and what a subclass adds."""

    buffers: ClassVar[tuple[str, ...]] = ("m", "v")

    a1: float = 0.9
    a2: float = 0.999
    eps: float = 1e-8

    @torch.no_grad()
    def local_step(self, state: State, *, inner: int, lr: float, decay: float = 0.0) -> None:
        """See Rule."""
        m, v, grad = state["m"], state["v"], state["grad"]
        m.lerp_(grad, 1 - self.a1)
        v.mul_(self.a2).addcmul_(grad, grad, value=1 - self.a2)
        self.candidate(state["theta"], m, v, grad, inner=inner, lr=lr, decay=decay)

    def candidate(
        self, theta: Tensor, m: Tensor, v: Tensor, out: Tensor, *, inner: int, lr: float, decay: float
    ) -> None:
        """Write theta_half of these moments into `out`."""
        m_correction = 1 - self.a1 ** (inner + 1)
        v_correction = 1 - self.a2 ** (inner + 1)
        denominator = v.sqrt().div_(v_correction**0.5).add_(self.eps)
        torch.mul(theta, 1 - lr * decay, out=out)
        out.addcdiv_(m, denominator, value=-lr / m_correction)

"""DECA's inner step on tensors of any shape: a local Adam step, then what gossip found out, folded into the moments.

With g the gradient of the active block, r = 0 .. R-1 the inner step since the block became active (arXiv 2606.03209,
after its openly quoted equations):

    m_half     = a1 m + (1 - a1) g                      v_half = a2 v + (1 - a2) g*g
    theta_half = theta - lr ( m_half / (1 - a1^(r+1)) / (sqrt(v_half / (1 - a2^(r+1))) + eps) + decay theta )
    theta'     = sum_j w_ij theta_half_j                (gossip, elsewhere)
    h          = signal(theta, theta_half, theta')
    m          = b1 m_half + (1 - b1) h                 v      = b2 v_half + (1 - b2) h*h

The decoupled weight decay is ours (Loshchilov and Hutter, arXiv 1711.05101). The sign and scale of h are not settled by
what is public, so each choice has a name:

    none               no h: m = m_half, v = v_half (gossip Adam per block; the paper's "w/o BMA")
    descent            theta - theta'
    transcribed        theta' - theta          to the letter of the one public transcription
    disagreement       theta_half - theta'     what gossip alone changed
    quasi_global       (theta - theta') / lr
    quasi_global_norm  (theta - theta') / (|theta - theta'|_2 + eps), the 2-norm over the whole block, after
                       quasi-global momentum (Lin et al., arXiv 2102.04761)
    trivial            as descent, but g stays out of the moments that are kept: m = b1 m + (1 - b1) h, and v likewise
                       (our reading of the paper's "w/ trivial BMA")

A client without a neighbour at a step (one client, an isolated one, a step without gossip) has no h: m = m_half and
v = v_half there, so that one client alone runs plain block-wise AdamW.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SIGNALS = ("none", "descent", "transcribed", "disagreement", "quasi_global", "quasi_global_norm", "trivial")


@dataclass(frozen=True)
class DecaRule:
    """The coefficients of the inner step. Works elementwise: on shards, on whole blocks, on stacked clients."""

    signal: str = "descent"
    a1: float = 0.9
    a2: float = 0.999
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if self.signal not in SIGNALS:
            raise ValueError(f"unknown signal {self.signal!r}; known: {', '.join(SIGNALS)}")

    @torch.no_grad()
    def local_step(
        self, theta: Tensor, grad: Tensor, m: Tensor, v: Tensor, *, inner: int, lr: float, decay: float = 0.0
    ) -> None:
        """The local Adam step; all tensors float32 of one shape.

        m and v become m_half and v_half (they stay as they are for "trivial"), `grad` becomes theta_half, and theta is
        left alone because the signal needs it. inner: r. decay: weight decay coefficient for all of theta.
        """
        if self.signal == "trivial":
            m, v = m.clone(), v.clone()
        m.lerp_(grad, 1 - self.a1)
        v.mul_(self.a2).addcmul_(grad, grad, value=1 - self.a2)
        m_correction = 1 - self.a1 ** (inner + 1)
        v_correction = 1 - self.a2 ** (inner + 1)
        denominator = v.sqrt().div_(v_correction**0.5).add_(self.eps)
        torch.mul(theta, 1 - lr * decay, out=grad)
        grad.addcdiv_(m, denominator, value=-lr / m_correction)

    @torch.no_grad()
    def accept(self, theta: Tensor, theta_half: Tensor, mixed: Tensor) -> None:
        """Take the mixed parameters: theta becomes theta', `theta_half` becomes h up to its scale (see `absorb`)."""
        if self.signal == "disagreement":
            theta_half.sub_(mixed)
        elif self.signal == "transcribed":
            torch.sub(mixed, theta, out=theta_half)
        else:
            torch.sub(theta, mixed, out=theta_half)
        theta.copy_(mixed)

    def scale(self, *, lr: float, norm: float) -> float:
        """What `accept`'s discrepancy is multiplied with to make h. norm: its 2-norm over the whole block."""
        if self.signal == "quasi_global":
            return 1 / lr if lr > 0 else 0.0
        if self.signal == "quasi_global_norm":
            return 1 / (norm + self.eps)
        return 1.0

    @property
    def needs_norm(self) -> bool:
        """Whether `scale` looks at the norm, which costs a reduction over the client's ranks."""
        return self.signal == "quasi_global_norm"

    @property
    def uses_signal(self) -> bool:
        """Whether the moments take anything from gossip at all."""
        return self.signal != "none"

    @torch.no_grad()
    def absorb(self, m: Tensor, v: Tensor, discrepancy: Tensor, scale: float = 1.0) -> None:
        """Fold h = scale * discrepancy into the moments, in place."""
        m.mul_(self.b1).add_(discrepancy, alpha=(1 - self.b1) * scale)
        v.mul_(self.b2).addcmul_(discrepancy, discrepancy, value=(1 - self.b2) * scale * scale)

"""DECA's inner step.

With g the gradient of the active block, r = 0 .. R-1 the inner step since the block became active (arXiv 2606.03209,
after its openly quoted equations):

    m_half     = a1 m + (1 - a1) g                      v_half = a2 v + (1 - a2) g*g
    theta_half = theta - lr ( m_half / (1 - a1^(r+1)) / (sqrt(v_half / (1 - a2^(r+1))) + eps) + decay theta )
    theta'     = sum_j w_ij theta_half_j                (gossip, elsewhere)
    h          = signal(theta, theta_half, theta')
    m          = b1 m_half + (1 - b1) h                 v      = b2 v_half + (1 - b2) h*h

The decoupled weight decay is ours. The sign and scale of h are not settled by what is public: each choice has a name.

    none               no h: m = m_half, v = v_half (gossip Adam per block; the paper's "w/o BMA")
    descent            theta - theta'
    transcribed        theta' - theta          to the letter of the one public transcription
    disagreement       theta_half - theta'     what gossip alone changed
    quasi_global       (theta - theta') / lr
    quasi_global_norm  (theta - theta') / (|theta - theta'|_2 + eps), the 2-norm over the whole block, after
                       quasi-global momentum (Lin et al., arXiv 2102.04761)
    trivial            as descent, but g stays out of the moments that are kept: m = b1 m + (1 - b1) h, and v likewise
                       (our reading of the paper's "w/ trivial BMA")
    fade               0: what the decays b1 and b2 do by themselves (ours, for comparison)

A client without a neighbour at a step (one client, an isolated one, a step without gossip) has no h: m = m_half and
v = v_half there, so that one client alone runs plain block-wise AdamW.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deca_ds.algorithm.adam import AdamRule
from deca_ds.algorithm.rule import State

SIGNALS = ("none", "descent", "transcribed", "disagreement", "quasi_global", "quasi_global_norm", "trivial", "fade")


@dataclass(frozen=True)
class DecaRule(AdamRule):
    """Block-wise Adam whose moments take a signal from gossip. b1, b2: decay of the moments when they do."""

    signal: str = "descent"
    b1: float = 0.9
    b2: float = 0.99

    def __post_init__(self) -> None:
        if self.signal not in SIGNALS:
            raise ValueError(f"unknown signal {self.signal!r}; known: {', '.join(SIGNALS)}")

    @property
    def needs_norm(self) -> bool:
        """See Rule."""
        return self.signal == "quasi_global_norm"

    @torch.no_grad()
    def local_step(self, state: State, *, inner: int, lr: float, decay: float = 0.0, alone: bool = False) -> None:
        """See Rule; m and v become m_half and v_half, or stay as they are for "trivial"."""
        if self.signal == "trivial":
            state = {**state, "m": state["m"].clone(), "v": state["v"].clone()}
        super().local_step(state, inner=inner, lr=lr, decay=decay, alone=alone)

    @torch.no_grad()
    def accept(self, state: State, name: str, mixed: Tensor) -> None:
        """Make theta theta', and state["grad"] h up to its scale."""
        theta, work = state["theta"], state["grad"]
        if self.signal == "disagreement":
            work.sub_(mixed)
        elif self.signal == "transcribed":
            torch.sub(mixed, theta, out=work)
        elif self.signal == "fade":
            work.zero_()
        elif self.signal != "none":
            torch.sub(theta, mixed, out=work)
        theta.copy_(mixed)

    @torch.no_grad()
    def finish(self, state: State, *, lr: float, norm: Tensor | float = 0.0, mixed: bool) -> None:
        """Fold h into the moments."""
        if not mixed or self.signal == "none":
            return
        h = state["grad"]
        if self.signal == "quasi_global":
            h.mul_(1 / lr if lr > 0 else 0.0)
        elif self.signal == "quasi_global_norm":
            h.div_(norm + self.eps)
        state["m"].lerp_(h, 1 - self.b1)
        state["v"].mul_(self.b2).addcmul_(h, h, value=1 - self.b2)

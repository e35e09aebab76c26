"""DECA whose next step repeats what the last averaging has changed. A rule of ours.

Where clients have different data, their local steps pull them apart in directions that stay the same from step to step,
and averaging only holds them together: they stop where the pull and the averaging balance, each on its own side of the
minimum of them all. Exact diffusion (Yuan, Ying, Zhao, Sayed, arXiv 1702.05122; D^2: Tang et al., arXiv 1803.07068)
takes the pull out by remembering what averaging had to undo. It does so for plain gradient steps. Here a client does it
beside DECA's local step and signal, block by block, with c the correction, d = 0 when a block becomes active:

    theta_half as DECA's
    sent   = theta_half + c d
    theta' = (sent + sum_j w_ij sent_j) / 2          (I + W) / 2, so that no eigenvalue is negative
    d      = theta' - theta_half                     what averaging and correction have changed
    h and the moments as DECA's, with `sent` for theta_half

Nothing more is sent than by DECA, and the averaging keeps the clients' mean, because the mean of d stays zero. Under
constant pulls clients stop at 1 - c of the distance at which the same averaging holds them without a correction.

Between averagings (gossip.every) d waits. If a client dies, the others' d no longer has a mean of zero: their mean
moves by up to c / (1 - c) times what its mean is then, over the steps to come, and no further; the next block starts
from d = 0. Averagings with a correction bring clients together on every undirected graph whose W does not change, for
any c in [0, 1], and with c = 0.9 on all graphs of the package (tested).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deca_ds.algorithm.contraction import NEVER, contraction, with_correction
from deca_ds.algorithm.deca import DecaRule
from deca_ds.algorithm.rule import State


@dataclass(frozen=True)
class DecaExactDiffusion(DecaRule):
    """See the module. correction: c, the part of d that the next step repeats. State: m, v, change (d)."""

    buffers: ClassVar[tuple[str, ...]] = ("m", "v", "change")
    adds: ClassVar[str] = "correction"
    correction: float = 0.9

    def warnings(self, matrices: Sequence[Tensor]) -> list[str]:
        """See Rule: a correction with which averagings drive clients apart, where they do not without it."""
        left = contraction(matrices, with_correction(self.correction))
        if left < 1 or contraction(matrices, with_correction(0.0)) > NEVER:
            return []
        return [
            f"algorithm.correction={self.correction:g} is too large for this graph: an averaging leaves {left:.3g} "
            "times what keeps the clients apart, so that they move apart. A smaller algorithm.correction or another "
            "gossip.graph helps"
        ]

    @torch.no_grad()
    def local_step(self, state: State, *, inner: int, lr: float, decay: float = 0.0, alone: bool = False) -> None:
        """See Rule; state["grad"] becomes what is sent. Alone, the correction waits for the next averaging."""
        super().local_step(state, inner=inner, lr=lr, decay=decay, alone=alone)
        if not alone:
            state["grad"].add_(state["change"], alpha=self.correction)

    @torch.no_grad()
    def skip_step(self, state: State) -> None:
        """See Rule; a parameter that made no step still takes part in the correction."""
        super().skip_step(state)
        state["grad"].add_(state["change"], alpha=self.correction)

    @torch.no_grad()
    def accept(self, state: State, name: str, mixed: Tensor) -> None:
        """Make theta theta', state["grad"] h up to its scale, and the change that of this averaging."""
        sent, change = state["grad"], state["change"]
        averaged = torch.lerp(sent, mixed, 0.5)
        change.mul_(self.correction).sub_(sent).add_(averaged)  # c d - sent is -theta_half
        super().accept(state, name, averaged)

    @torch.no_grad()
    def stay(self, state: State) -> None:
        """See Rule; the correction waits for the next averaging."""
        torch.sub(state["grad"], state["change"], alpha=self.correction, out=state["theta"])

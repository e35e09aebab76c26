"""What DECA is compared with: rules of others on the same state, schedule and gossip.

theta_half is the local candidate, theta' = sum_j w_ij theta_half_j; each class gives its source and its equations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deca_ds.algorithm.adam import AdamRule
from deca_ds.algorithm.contraction import NEVER, contraction, with_momentum, with_outer_step
from deca_ds.algorithm.rule import State


@dataclass(frozen=True)
class GossipAdam(AdamRule):
    """Local AdamW steps, of which the parameters are averaged and the moments stay: DECA without a signal.

        theta = theta'                      AdamW (Loshchilov and Hutter, arXiv 1711.05101) where there is no neighbour

    State: m, v.
    """

    @torch.no_grad()
    def accept(self, state: State, name: str, mixed: Tensor) -> None:
        """Make theta theta'."""
        state["theta"].copy_(mixed)


@dataclass(frozen=True)
class QgAdam(AdamRule):
    """QG-Adam: Adam whose kept moments follow the direction in which the network moves (Lin et al., arXiv 2102.04761).

        m = a1 mh + (1 - a1) g            v = a2 vh + (1 - a2) g*g          used for theta_half, then dropped
        d = (theta - theta') / (|theta - theta'|_2 + eps)                   the 2-norm over the whole block
        mh = a1 mh + (1 - a1) d           vh = a2 vh + (1 - a2) d*d         kept

    At a step without a neighbour theta' is theta_half. d has the norm 1 whatever the gradient is: where the block's
    gradient is small beside it, each step renews the direction of the ones before, at a full learning rate. State: mh,
    vh (named m, v).
    """

    @property
    def needs_norm(self) -> bool:
        """See Rule."""
        return True

    @torch.no_grad()
    def local_step(self, state: State, *, inner: int, lr: float, decay: float = 0.0, alone: bool = False) -> None:
        """See Rule; the kept moments stay as they are."""
        passing = {**state, "m": state["m"].clone(), "v": state["v"].clone()}
        super().local_step(passing, inner=inner, lr=lr, decay=decay)
        if alone:
            self.stay(state)

    @torch.no_grad()
    def accept(self, state: State, name: str, mixed: Tensor) -> None:
        """Make theta theta', and state["grad"] theta - theta'."""
        torch.sub(state["theta"], mixed, out=state["grad"])
        state["theta"].copy_(mixed)

    @torch.no_grad()
    def stay(self, state: State) -> None:
        """Do as `accept` of theta_half."""
        self.accept(state, "grad", state["grad"].clone())

    @torch.no_grad()
    def finish(self, state: State, *, lr: float, norm: Tensor | float = 0.0, mixed: bool) -> None:
        """Fold d into the kept moments."""
        d = state["grad"].div_(norm + self.eps)
        state["m"].lerp_(d, 1 - self.a1)
        state["v"].mul_(self.a2).addcmul_(d, d, value=1 - self.a2)


@dataclass(frozen=True)
class GtAdam(AdamRule):
    """Adam on a tracked gradient (gradient tracking: Di Lorenzo and Scutari, arXiv 1602.00591; with Adam's moments:
    Carnevale et al., arXiv 2009.01745).

        s = g                                    at a block's first step
        s = s_mixed + g - g_previous             later; s_mixed = sum_j w_ij s_j of the step before
        Adam step with s for g;  theta' = sum_j w_ij theta_half_j

    The mean of s over the clients is the mean of g for every doubly stochastic W. State: m, v, tracker, previous; two
    tensors travel, twice the traffic of the others.
    """

    buffers: ClassVar[tuple[str, ...]] = ("m", "v", "tracker", "previous")
    travels: ClassVar[tuple[str, ...]] = ("grad", "tracker")

    @torch.no_grad()
    def local_step(self, state: State, *, inner: int, lr: float, decay: float = 0.0, alone: bool = False) -> None:
        """See Rule; tracker and previous start at zero, which makes the first tracker the gradient."""
        grad, tracker, previous = state["grad"], state["tracker"], state["previous"]
        tracker.add_(grad).sub_(previous)
        previous.copy_(grad)
        grad.copy_(tracker)
        super().local_step(state, inner=inner, lr=lr, decay=decay, alone=alone)

    @torch.no_grad()
    def skip_step(self, state: State) -> None:
        """See Rule; the tracker continues with a gradient of zero, so that its mean stays that of the gradients."""
        state["tracker"].sub_(state["previous"])
        state["previous"].zero_()
        super().skip_step(state)

    @torch.no_grad()
    def accept(self, state: State, name: str, mixed: Tensor) -> None:
        """Make theta or the tracker its average."""
        state["theta" if name == "grad" else name].copy_(mixed)


def _drives_apart(momentum: float, left: float) -> str:
    return (
        f"algorithm.outer_momentum={momentum:g} drives the clients apart on this graph: an averaging leaves {left:.3g} "
        "times what keeps them apart. A smaller one helps, or another gossip.graph"
    )


@dataclass(frozen=True)
class DiLoCo(AdamRule):
    """Local AdamW steps between two averagings, then an outer Nesterov step (Douillard et al., arXiv 2311.08105).

        delta = anchor - theta'             theta' = sum_j w_ij theta_half_j, after every s-th inner step
        b     = mu b + delta                theta = anchor - outer_lr ( delta + mu b );  anchor = theta

    with mu the outer momentum. The original averages exactly, as the complete graph does here; on other graphs it is a
    decentralized variant of ours. A step without a neighbour is an inner step. State: m, v, anchor, momentum. Adam's
    moments live on.
    """

    buffers: ClassVar[tuple[str, ...]] = ("m", "v", "anchor", "momentum")
    adds: ClassVar[str] = "outer step"
    nesterov: ClassVar[bool] = True
    outer_lr: float = 0.7
    outer_momentum: float = 0.9

    def warnings(self, matrices: Sequence[Tensor]) -> list[str]:
        """See Rule: a momentum that drives clients apart, where they come together without it."""
        plain, left = (
            contraction(matrices, with_outer_step(self.outer_lr, mu, nesterov=self.nesterov))
            for mu in (0.0, self.outer_momentum)
        )
        return [_drives_apart(self.outer_momentum, left)] if left > 1 + 1e-9 and plain < NEVER else []

    @torch.no_grad()
    def open(self, state: State) -> None:
        """See Rule."""
        state["anchor"].copy_(state["theta"])

    @torch.no_grad()
    def accept(self, state: State, name: str, mixed: Tensor) -> None:
        """Make the outer step."""
        anchor, momentum = state["anchor"], state["momentum"]
        delta = torch.sub(anchor, mixed, out=state["grad"])
        momentum.mul_(self.outer_momentum).add_(delta)
        anchor.sub_(delta.add_(momentum, alpha=self.outer_momentum), alpha=self.outer_lr)
        state["theta"].copy_(anchor)


@dataclass(frozen=True)
class NoLoCo(DiLoCo):
    """Local AdamW steps between two averagings, then an outer step with momentum that also pulls a client to those that
    it averages with (Kolehmainen et al., arXiv 2506.10911, after their public implementation).

        delta = anchor - theta'             theta' = sum_j w_ij theta_half_j, after every s-th inner step
        b     = mu b + delta                theta = anchor - outer_lr b;  anchor = theta

    with mu the outer momentum. -delta is the mean of what the averaged clients have moved plus the mean of their
    anchors less the own one: both terms of the paper, with the same factor, outer_lr. The paper's pairs are
    gossip.graph=random_pairs, its outer momentum is below DiLoCo's (0.3 in a configuration of theirs). A step without a
    neighbour is an inner step. State: m, v, anchor, momentum. Adam's moments live on.
    """

    nesterov: ClassVar[bool] = False

    @torch.no_grad()
    def accept(self, state: State, name: str, mixed: Tensor) -> None:
        """Make the outer step."""
        anchor, momentum = state["anchor"], state["momentum"]
        momentum.mul_(self.outer_momentum).add_(anchor).sub_(mixed)
        anchor.sub_(momentum, alpha=self.outer_lr)
        state["theta"].copy_(anchor)


@dataclass(frozen=True)
class GasLoC(AdamRule):
    """Local AdamW steps between two averagings, then an averaging with momentum on where the local steps ended
    (Cagnasso, Belilovsky, Oyallon, arXiv 2606.11081, after a public summary of its equations).

        y      = theta_half                             after every s-th inner step
        theta  = theta' + mu (y - y_previous)           theta' = sum_j w_ij y_j;  y_previous = y

    with mu the outer momentum; y_previous starts at theta. The paper's outer learning rate is 1 here, and its gossip
    step times the graph's Laplacian is I - W. The clients' mean then makes DiLoCo's outer step with outer_lr 1 on
    every graph. What keeps the clients apart follows the heavy ball method: an averaging leaves sqrt(mu) of it from
    mu = (1 - sqrt(spectral gap))^2 on, which suits the graph best; see contraction.py. A step without a neighbour is an
    inner step. State: m, v, previous. Adam's moments live on.
    """

    buffers: ClassVar[tuple[str, ...]] = ("m", "v", "previous")
    adds: ClassVar[str] = "momentum"
    outer_momentum: float = 0.9

    def warnings(self, matrices: Sequence[Tensor]) -> list[str]:
        """See Rule: a momentum with which clients agree later than without it, or never."""
        momentum = self.outer_momentum
        plain, left = (contraction(matrices, with_momentum(mu)) for mu in (0.0, momentum))
        if plain > NEVER or left < plain + 0.005:  # nothing brings them together, or the numbers would look the same
            return []
        if left > 1:
            return [_drives_apart(momentum, left)]
        best = "a smaller one brings them together faster"
        if len(matrices) == 1 and torch.allclose(matrices[0], matrices[0].T):
            best = f"(1 - sqrt(spectral gap))^2 = {(1 - math.sqrt(1 - plain)) ** 2:.2g} brings them together fastest"
        return [
            f"algorithm.outer_momentum={momentum:g} is large for this graph: an averaging leaves up to {left:.2g} of "
            f"what keeps the clients apart, and {plain:.2g} without momentum; {best}"
        ]

    @torch.no_grad()
    def open(self, state: State) -> None:
        """See Rule."""
        state["previous"].copy_(state["theta"])

    @torch.no_grad()
    def accept(self, state: State, name: str, mixed: Tensor) -> None:
        """Average with momentum; state["grad"] is still y."""
        theta, y, previous = state["theta"], state["grad"], state["previous"]
        torch.sub(y, previous, out=theta).mul_(self.outer_momentum).add_(mixed)
        previous.copy_(y)

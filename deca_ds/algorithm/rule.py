"""The contract of a method: what an inner step does to one client's state of the active block.

    rule.open(state)                                    the block becomes active
    for every inner step:
        state["grad"] <- gradient at theta
        rule.local_step(state, ...)                     leaves theta_half in state["grad"], or
        rule.skip_step(state)                           for parameters that got no gradient
        for name in rule.travels:                       where the client has a neighbour at this step
            rule.accept(state, name, sum_j w_ij state_j[name])
        rule.stay(state)                                where it has none
        rule.finish(state, ...)                         theta is where the next gradient is taken

A state is a mapping of tensors of one shape: "theta", "grad" and the rule's own `buffers`, all float32. Everything but
`finish`'s norm is elementwise, so the same code works on a chunk of a ZeRO-3 shard, on a whole block and on the stacked
blocks of n clients. A rule itself holds nothing but coefficients: who keeps the state keeps all there is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

State = Mapping[str, Tensor]
MASTERS, GRADIENT = "theta", "grad"  # tensors that every state has


@dataclass(frozen=True)
class Rule(ABC):
    """A method's inner step. Subclasses are frozen dataclasses of their coefficients.

    buffers: state beside theta and grad; float32 tensors, 4 bytes per active parameter each.
    travels: what neighbours average, in this order; "grad" stands for theta_half, which lies there by then.
    """

    buffers: ClassVar[tuple[str, ...]] = ()
    travels: ClassVar[tuple[str, ...]] = ("grad",)

    @property
    def bytes_per_parameter(self) -> int:
        """State of one active parameter: theta, grad and the buffers in float32."""
        return 4 * (2 + len(self.buffers))

    @property
    def needs_norm(self) -> bool:
        """Whether `finish` looks at the norm, which costs a reduction over the client's ranks."""
        return False

    def open(self, state: State) -> None:  # noqa: B027 (most rules start from zeros)
        """Prepare the buffers of a block that becomes active; they come in zero."""

    @abstractmethod
    def local_step(self, state: State, *, inner: int, lr: float, decay: float = 0.0) -> None:
        """Take the gradient into the buffers and leave theta_half in state["grad"]; theta stays, for later parts.

        inner: r, the local steps that these parameters have made since the block became active: 0 .. R-1. decay:
        coefficient of the decoupled weight decay, of all of theta.
        """

    @torch.no_grad()
    def skip_step(self, state: State) -> None:
        """Instead of `local_step`, for parameters that no gradient reached at this step: they stay where they are,
        without weight decay, and so do the buffers (torch.optim.AdamW with grad None). state["grad"] is zero here."""
        state["grad"].copy_(state["theta"])

    @abstractmethod
    def accept(self, state: State, name: str, mixed: Tensor) -> None:
        """Take the neighbours' average of what travelled under `name`; called for each of `travels`, in their order."""

    def stay(self, state: State) -> None:
        """End a step at which the client has no neighbour, instead of `accept`: theta becomes theta_half."""
        state["theta"].copy_(state["grad"])

    def finish(self, state: State, *, lr: float, norm: Tensor | float = 0.0, mixed: bool) -> None:  # noqa: B027
        """Update the buffers after `accept` (mixed) or `stay`.

        norm: if `needs_norm`, the 2-norm over the whole block of what these left in state["grad"]. One number, or a
        column of one per client for stacked states.
        """

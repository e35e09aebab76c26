"""The contract of a method: what an inner step does to one client's state of the active block.

    rule.open(state)                                    the block becomes active
    for every inner step:
        state["grad"] <- gradient at theta
        rule.local_step(state, ...)                     leaves theta_half in state["grad"], or
        rule.skip_step(state)                           for parameters that got no gradient
        for name in rule.travels:                       where the client has a neighbour at this step
            rule.accept(state, name, sum_j w_ij state_j[name])
        rule.stay(state)                                where it has none; rule.local_step(state, ..., alone=True) is
                                                        both in one, for steps known to have none
        rule.finish(state, ...)                         theta is where the next gradient is taken

A state is a mapping of tensors of one shape: "theta", "grad" and the rule's own `buffers`, all float32. All operations
are elementwise, except for the norm that `finish` gets, so the same code works on a chunk of a ZeRO-3 shard [elements],
on a whole block, and on the stacked blocks of n clients [n, elements]. A rule itself holds only coefficients, so saving
the state saves everything.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Rule(ABC):
    """A method's inner step. Subclasses are frozen dataclasses of their coefficients.

    buffers: names of the state beside theta and grad; float32 tensors, 4 bytes per active parameter each.
    travels: names of the tensors that neighbours average, in this order; "grad" holds theta_half by then.
    adds: what it adds to a plain averaging of the parameters, in a word or two; empty where it adds nothing.
    """

    buffers: ClassVar[tuple[str, ...]] = ()
    travels: ClassVar[tuple[str, ...]] = ("grad",)
    adds: ClassVar[str] = ""

    @property
    def bytes_per_parameter(self) -> int:
        """State of one active parameter: theta, grad and the buffers in float32."""
        return 4 * (2 + len(self.buffers))

    @property
    def needs_norm(self) -> bool:
        """Whether `finish` needs the norm, which takes a reduction over the client's ranks."""
        return False

    def warnings(self, matrices: Sequence[Tensor]) -> list[str]:
        """Warn, in whole sentences, of a graph that does not suit the rule's coefficients; empty where nothing is known
        against it. matrices: W of each averaging of a period, [n, n], float64."""
        return []

    def open(self, state: State) -> None:  # noqa: B027 (most rules start from zeros)
        """Initialise the buffers of a block that becomes active; they are zero when this is called."""

    @abstractmethod
    def local_step(self, state: State, *, inner: int, lr: float, decay: float = 0.0, alone: bool = False) -> None:
        """Update the buffers with the gradient and leave theta_half in state["grad"]; theta itself must not change.

        inner: r, the local steps that these parameters have made since the block became active: 0 .. R-1. decay:
        coefficient of the decoupled weight decay, which applies to all of theta. alone: the client has no neighbour at
        this step, so do what `stay` does as well; a rule may do both at once, in theta.
        """

    @torch.no_grad()
    def skip_step(self, state: State) -> None:
        """Leave parameters that no gradient reached at this step where they are, without weight decay, and so the
        buffers; called instead of `local_step` (torch.optim.AdamW with grad None). state["grad"] is zero here."""
        state["grad"].copy_(state["theta"])

    @abstractmethod
    def accept(self, state: State, name: str, mixed: Tensor) -> None:
        """Take in the weighted mean of state[name] over this client and its neighbours; called for each name of
        `travels`, in that order. mixed: of the state's shape, float32."""

    def stay(self, state: State) -> None:
        """End a step at which the client has no neighbour, instead of `accept`: theta becomes theta_half."""
        state["theta"].copy_(state["grad"])

    def finish(self, state: State, *, lr: float, norm: Tensor | float = 0.0, mixed: bool) -> None:  # noqa: B027
        """Update the buffers after `accept` (mixed) or `stay`.

        norm: if `needs_norm`, the 2-norm over the whole block of what `accept` or `stay` left in state["grad"]. One
        number, or [n, 1] for the stacked states of n clients.
        """

"""Which block is active at which inner step, when clients gossip, and how large the learning rate is.

Everything is a function of the inner step's index, so that every rank agrees without talking and a resumed run knows
where it is.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One inner step.

    index: of all inner steps of the run, from 0. round: 0 .. T-1. block: index of the active block.
    inner: r, counted from 0 since the block became active. opens, closes: first and last step of an activation.
    gossip: how many averagings came before the one at the end of this step, or None where there is none.
    """

    index: int
    round: int
    block: int
    inner: int
    opens: bool
    closes: bool
    gossip: int | None


@dataclass(frozen=True)
class Schedule:
    """T rounds over B blocks with R inner steps each; gossip after every s-th inner step of an activation.

    The last step of an activation always gossips: a block is never left as its clients trained it apart. A single block
    has nothing to make room for: it stays active, with its moments, through all rounds.
    order: "ascending", "descending" or "random" (reshuffled every round from `seed`).
    """

    rounds: int
    blocks: int
    inner_steps: int
    gossip_every: int = 1
    order: str = "ascending"
    seed: int = 0

    def __len__(self) -> int:
        return self.rounds * self.blocks * self.inner_steps

    def __iter__(self) -> Iterator[Step]:
        return (self.step(index) for index in range(len(self)))

    @property
    def activation_steps(self) -> int:
        """Inner steps from a block's opening to its closing."""
        return self.inner_steps * (self.rounds if self.blocks == 1 else 1)

    def block_order(self, round_index: int) -> list[int]:
        """Return the indices of all blocks in the order in which the given round visits them."""
        order = list(range(self.blocks))
        if self.order == "descending":
            order.reverse()
        elif self.order == "random":
            random.Random(f"{self.seed}/{round_index}").shuffle(order)
        return order

    def trained(self, first: int, last: int) -> set[int]:
        """Return the indices of the blocks of the inner steps first .. last - 1."""
        length = self.activation_steps
        return {self.step(index).block for index in range(first - first % length, last, length) if first < last}

    def step(self, index: int) -> Step:
        """Return the inner step with this index, 0 <= index < len(self)."""
        if not 0 <= index < len(self):
            raise IndexError(f"inner step {index} of {len(self)}")
        length = self.activation_steps
        activation, inner = divmod(index, length)
        round_index, within = divmod(index, self.blocks * self.inner_steps)
        position = within // self.inner_steps
        closes = inner == length - 1
        gossips = closes or (inner + 1) % self.gossip_every == 0
        per_activation = math.ceil(length / self.gossip_every)
        return Step(
            index=index,
            round=round_index,
            block=self.block_order(round_index)[position],
            inner=inner,
            opens=inner == 0,
            closes=closes,
            gossip=activation * per_activation + inner // self.gossip_every if gossips else None,
        )


def learning_rate(
    index: int, total: int, *, peak: float, schedule: str = "constant", warmup_steps: int = 0, final_ratio: float = 0.0
) -> float:
    """Return the learning rate of inner step `index` of `total`.

    Linear from peak / warmup_steps to `peak` over the warm-up, then constant, or falling along a line or half a cosine
    to peak * final_ratio one step after the last, so that no step is spent on a rate of 0.
    """
    if index < warmup_steps:
        return peak * (index + 1) / warmup_steps
    progress = (index - warmup_steps) / max(1, total - warmup_steps)
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * (1 - (1 - final_ratio) * progress)
    if schedule == "cosine":
        return peak * (final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))
    raise ValueError(f"unknown learning rate schedule {schedule!r}")

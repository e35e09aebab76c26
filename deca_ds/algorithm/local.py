"""The local step of a block whose parameters need not all have a gradient: a module that did not run leaves none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deca_ds.algorithm.rule import Rule, State


@dataclass(frozen=True)
class Run:
    """Elements [start, stop) of a block's state that make the same local step.

    decays: whether weight decay applies to them. inner: their Adam steps before this one; None: they make no step.
    """

    start: int
    stop: int
    decays: bool
    inner: int | None


class LocalSteps:
    """Counts the Adam steps of every parameter of one client's active block, as torch.optim.AdamW does.

    sizes: each parameter's elements in the state. decays: whether weight decay applies to it. made: its Adam steps
    since the block became active, the same on all ranks of the client.
    """

    def __init__(self, sizes: Sequence[int], decays: Sequence[bool]):
        self.sizes, self.decays = tuple(sizes), tuple(decays)
        self.made = [0] * len(self.sizes)

    def next(self, reached: Sequence[bool]) -> list[Run]:
        """Return the runs of the next step, without gaps. It counts for those parameters that a gradient has reached.

        reached: on any of the client's ranks. A gradient of zeros counts as one.
        """
        runs: list[Run] = []
        start = 0
        for place, size in enumerate(self.sizes):
            inner = self.made[place] if reached[place] else None
            run = Run(start, start + size, self.decays[place], inner)
            if runs and (runs[-1].decays, runs[-1].inner) == (run.decays, run.inner):
                run = Run(runs.pop().start, run.stop, run.decays, run.inner)
            runs.append(run)
            start += size
            self.made[place] += bool(reached[place])
        return runs


def local_step(
    rule: Rule, state: State, runs: Iterable[Run], chunk: slice, *, lr: float, weight_decay: float, alone: bool = False
) -> None:
    """Apply the rule's local step to the elements `chunk` of one client's state, run by run. lr: of this step. alone:
    see Rule.local_step."""
    for run in runs:
        elements = slice(max(run.start, chunk.start), min(run.stop, chunk.stop))
        if elements.start >= elements.stop:
            continue
        part = {name: tensor[elements] for name, tensor in state.items()}
        if run.inner is None:
            rule.skip_step(part)
            if alone:
                rule.stay(part)
        else:
            rule.local_step(part, inner=run.inner, lr=lr, decay=weight_decay if run.decays else 0.0, alone=alone)

"""A run ends at its first loss, gradient, parameter, moment or score that is not finite.

What an inner step computes is checked with numbers that the client's ranks reduce anyway: loss and gradient norm before
the local step, and what the local step and the averaging left behind with the next gradient. Before anything is scored
or saved that has a reduction of its own. So nothing that is not finite is ever in a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from deca_ds.algorithm import Step
from deca_ds.checkpoint.steps import step_folder
from deca_ds.engine.client import Client, GradientStats
from deca_ds.errors import DivergedError
from deca_ds.launch.world import Cluster
from deca_ds.plural import named

_FIX = "lower optimizer.lr, set optimizer.clip_norm, or look at the data"


@dataclass
class Watch:
    """Watches one client, all of whose ranks come to the same verdict. buffers: names of the rule's buffers."""

    client: Client
    cluster: Cluster
    buffers: Sequence[str]
    _last: str = "before the first inner step"

    def gradient(self, step: Step, stats: GradientStats) -> None:
        """Raise DivergedError unless the state that the step before left is finite, and loss and gradient of `step`."""
        self._refuse_state(stats.kept, stats.by_rank[2:])
        block = self.client.plan.blocks[step.block].label
        self._last = f"inner step {step.index + 1}, block {block}"
        self._refuse(("the loss is", "the norm of the gradient is"), (stats.loss, stats.norm), stats.by_rank)

    def state(self) -> None:
        """Raise DivergedError unless the state that the last inner step left is finite."""
        self._refuse_state(*self.client.kept())

    def _refuse_state(self, kept: Sequence[float], by_rank: Tensor) -> None:
        names = (
            "the norm of the block's parameters is",
            *(f"the optimizer's state {name!r} is" for name in self.buffers),
        )
        self._refuse(names, kept, by_rank)

    def _refuse(self, names: Sequence[str], values: Sequence[float], by_rank: Tensor) -> None:
        for (name, value), own in zip(zip(names, values, strict=False), by_rank, strict=False):
            if not math.isfinite(value):
                raise not_finite(self.cluster.client, name, value, f"{self._last}, {self._origin(own)}")

    def _origin(self, own: Tensor) -> str:
        """Name the ranks whose part is not finite. All ranks of the client call this."""
        bad = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=self.client.device)
        bad[dist.get_rank()] = not own.isfinite()
        dist.all_reduce(bad)
        every = self.cluster.layout.ranks_of(self.cluster.client)
        ranks = [rank for rank, is_bad in zip(every, bad, strict=True) if is_bad]
        return named("rank", ranks) if ranks else "the sum over its ranks"


def not_finite(client: int, name: str, value: float, where: str) -> DivergedError:
    """Make the error for a value of a client. name: subject and verb, as in "the loss is". where: step, block and
    ranks."""
    return diverged(f"client {client}", f"{name} not finite ({value:g})", f"client {client}, {where}")


def diverged(whose: str, how: str, where: str) -> DivergedError:
    """Make the error. whose: the model, as in "client 3". how: what is not finite."""
    return DivergedError(f"{whose} has diverged: {how}", where=where, fix=_FIX)


def with_checkpoint(error: DivergedError, folder: Path, newest: int | None) -> DivergedError:
    """Add to the error what is left in `folder`. newest: inner steps of the last checkpoint that all ranks have."""
    left = "no checkpoint had been saved: start anew, in a new folder"
    if newest is not None:
        left = f"run.resume=require continues after inner step {newest}, also with another section optimizer"
    where = f"{error.where}\n         {step_folder(folder, newest)} is finite" if newest is not None else error.where
    return type(error)(error.what, where=where, fix=f"{error.fix}\n         {left}")

"""n models of one architecture as one matrix, a row a client, of which blocks are column ranges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import inf, prod

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deca_ds.algorithm import BlockPlan, LocalSteps
from deca_ds.engine.losses import RowScores, count_targets, row_scores, training_loss
from deca_ds.engine.masters import rounded

Batch = Mapping[str, Tensor]

_CPU = torch.device("cpu")


class StackedClients:
    """The clients' masters, float32 [n, numel], and one module that takes the place of each client in turn: with these
    as its parameters, rounded to its own data type.

    A block's columns lie together, matrices before vectors, so that the active block of all clients is a view. The
    clients start from the same weights. Gradients are computed one client at a time: with models of a size that is
    worth simulating the arithmetic takes the time, and any model that transformers can build works.
    """

    def __init__(self, model: PreTrainedModel, plan: BlockPlan, clients: int):
        self.plan = plan
        self.clients = clients
        self.model = model
        self._parameters = dict(model.named_parameters())
        self.names = [name for block in plan.blocks for name in self._ordered(block.names)] + list(plan.frozen)
        starts = [0]
        for name in self.names:
            starts.append(starts[-1] + self._parameters[name].numel())
        self._columns = {name: slice(a, b) for name, a, b in zip(self.names, starts, starts[1:], strict=False)}
        self._shapes = {name: self._parameters[name].shape for name in self.names}
        row = torch.cat([self._parameters[name].detach().float().flatten() for name in self.names])
        self.values = row.repeat(clients, 1)
        for parameter in self._parameters.values():
            parameter.requires_grad_(False)

    @property
    def architecture(self) -> str:
        """The class of the models."""
        return type(self.model).__name__

    def _ordered(self, names: Sequence[str]) -> list[str]:
        return sorted(names, key=lambda name: self._parameters[name].dim() < 2)  # stable

    def block_names(self, index: int) -> list[str]:
        """Return the names of the block's parameters in the order of its columns."""
        return self._ordered(self.plan.blocks[index].names)

    def block(self, index: int) -> tuple[Tensor, list[LocalSteps]]:
        """Return the block's parameters, a view [n, numel], and each client's local steps, none of them made."""
        names = self.block_names(index)
        start, stop = self._columns[names[0]].start, self._columns[names[-1]].stop
        sizes = [prod(self._shapes[name]) for name in names]
        decays = [len(self._shapes[name]) >= 2 for name in names]
        return self.values[:, start:stop], [LocalSteps(sizes, decays) for _ in range(self.clients)]

    def parameters(self, client: int) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, values) of one client's model, as views."""
        for name in self.names:
            yield name, self.values[client, self._columns[name]].view(self._shapes[name])

    def gradient(
        self,
        index: int,
        client: int,
        micro_batches: Sequence[Batch],
        out: Tensor,
        clip_norm: float = 0.0,
    ) -> tuple[float, float, list[bool]]:
        """Fill `out`, [numel] of block `index`, with the gradient of the mean loss over the targets.

        clip_norm: 2-norm that the gradient is scaled down to; 0: not at all. Returns the loss, the gradient's 2-norm
        before clipping, and for each of the block's parameters whether a gradient has reached it.
        """
        self._become(self.values[client])
        out.zero_()
        names = self.block_names(index)
        sizes = [self._parameters[name].numel() for name in names]
        parts = dict(zip(names, out.split(sizes), strict=True))
        reached = [False] * len(names)

        def note(place: int) -> None:
            reached[place] = True

        hooks = []
        for place, name in enumerate(names):
            parameter = self._parameters[name].requires_grad_(True)
            hooks.append(parameter.register_post_accumulate_grad_hook(lambda _, place=place: note(place)))
        targets = max(1, sum(count_targets(batch) for batch in micro_batches))
        total = 0.0
        self._mode(training=True)
        for batch in micro_batches:
            loss = training_loss(self.model, batch, _CPU, targets)
            if loss.requires_grad:
                loss.backward()
            total += float(loss.detach())
            for name, part in parts.items():
                parameter = self._parameters[name]
                if parameter.grad is not None:
                    part.add_(parameter.grad.flatten())
                parameter.grad = None
        for hook in hooks:
            hook.remove()
        for name in names:
            self._parameters[name].requires_grad_(False)
        norm = float(torch.linalg.vector_norm(out))
        if 0 < clip_norm < norm < inf:
            out.mul_(clip_norm / norm)
        return total, norm, reached

    @torch.no_grad()
    def score(self, row: Tensor, batch: Batch) -> RowScores:
        """Return how well the model with the parameters `row`, [numel], predicts the targets of each row of a batch."""
        self._become(row)
        self._mode(training=False)
        return row_scores(self.model, batch, _CPU)

    def _mode(self, *, training: bool) -> None:
        if self.model.training != training:  # it visits every module, of which a small model has many
            self.model.train(training)

    def _become(self, row: Tensor) -> None:
        for name, parameter in self._parameters.items():
            values = row[self._columns[name]].view(self._shapes[name])
            parameter.data = rounded(values) if parameter.dtype == torch.bfloat16 else values

"""Reduce the active block's gradients to this rank's float32 shard while the backward pass runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass
class _Bucket:
    """One reduce-scatter: rows[r] holds, parameter after parameter, what rank r gets; `mine` is this rank's row."""

    members: list[tuple[int, int]]  # (parameter, padded elements a rank)
    mine: Tensor
    rows: Tensor | None = None
    work: dist.Work | None = None


class GradientReducer:
    """Sums gradients over the client's ranks into float32 shards, parameter by parameter, as autograd produces them.

    parameters: the block's, in one order on all ranks. shards: for each, this rank's 1-D float32 slice, which the
    summed gradient is added to. Full gradients live from autograd's hook until their bucket of about `bucket_numel`
    elements is sent. Buckets go out in the reverse of the parameters' order, whatever order the hooks fire in, and a
    parameter without a gradient counts as zero: so ranks cannot disagree about what a collective holds.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], shards: Sequence[Tensor], bucket_numel: int):
        self._parameters, self._shards, self._bucket_numel = parameters, shards, bucket_numel
        self._ranks, self._rank = dist.get_world_size(), dist.get_rank()
        self._ready: dict[int, Tensor] = {}
        self._queue: list[tuple[int, Tensor]] = []
        self._sent: _Bucket | None = None
        self._next = len(parameters) - 1
        self._hooks = [
            p.register_post_accumulate_grad_hook(lambda p, index=index: self._take(index, p))
            for index, p in enumerate(parameters)
        ]

    def finish(self) -> None:
        """Send what is left of this backward pass and wait until every shard has it."""
        while self._next >= 0:
            self._queue.append((self._next, self._ready.pop(self._next, None)))
            self._next -= 1
        self._send()
        self._receive()
        self._next = len(self._parameters) - 1

    def close(self) -> None:
        """Take the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()

    def _take(self, index: int, parameter: nn.Parameter) -> None:
        self._ready[index], parameter.grad = parameter.grad.detach().reshape(-1), None
        while self._next in self._ready:
            self._queue.append((self._next, self._ready.pop(self._next)))
            self._next -= 1
            if sum(self._parameters[i].ds_numel for i, _ in self._queue) >= self._bucket_numel:
                self._send()

    def _send(self) -> None:
        """Start the reduce-scatter of the queued gradients; the one before it is waited for."""
        queue, self._queue = self._queue, []
        if not queue:
            return
        if self._ranks == 1:
            for index, gradient in queue:
                if gradient is not None:
                    self._shards[index].add_(gradient)
            return
        sizes = [self._parameters[index].ds_tensor.ds_numel for index, _ in queue]
        rows = torch.zeros(self._ranks, sum(sizes), dtype=torch.float32, device=self._shards[queue[0][0]].device)
        for (_, gradient), size, columns in zip(queue, sizes, rows.split(sizes, dim=1), strict=True):
            if gradient is not None:
                for rank, part in enumerate(gradient.split(size)):
                    columns[rank, : part.numel()].copy_(part)
        self._receive()
        mine = torch.empty_like(rows[0])
        work = dist.reduce_scatter_tensor(mine, rows.view(-1), op=dist.ReduceOp.SUM, async_op=True)
        self._sent = _Bucket([(index, size) for (index, _), size in zip(queue, sizes, strict=True)], mine, rows, work)

    def _receive(self) -> None:
        """Wait for the bucket on its way and add it to the shards."""
        if self._sent is None:
            return
        bucket, self._sent = self._sent, None
        bucket.work.wait()
        for (index, _), part in zip(bucket.members, bucket.mine.split([s for _, s in bucket.members]), strict=True):
            shard = self._shards[index]
            shard.add_(part[: shard.numel()])

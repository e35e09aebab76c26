"""Reduce the active block's gradients to this rank's float32 shard while the backward pass runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass
class _Sent:
    """One reduce-scatter: rows[r] holds, parameter after parameter, what rank r gets; `mine` is this rank's row."""

    members: list[tuple[int, int]]  # (parameter, padded elements a rank)
    mine: Tensor
    rows: Tensor
    work: dist.Work


class GradientReducer:
    """Sums gradients over the client's ranks into float32 shards, bucket by bucket, as autograd produces them.

    parameters: the block's, in one order on all ranks. shards: for each, this rank's 1-D float32 slice, which the
    summed gradient is added to. varies: whether its module may run on some ranks only (an expert that gets no tokens).
    reached: whether it has had a gradient on this rank since `forget`.

    Which parameters make a bucket of about `bucket_numel` elements is fixed, in the reverse of their order, and so is
    the order of the buckets; a parameter without a gradient counts as zero. A bucket is sent when its gradients are
    there, between the collectives of the backward pass. Where that time may differ from rank to rank, because a
    parameter varies, and where a gradient does not come, it is sent at the end. So ranks cannot disagree about which
    collective comes next or what it holds. Full gradients live from autograd's hook until they are sent.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], shards: Sequence[Tensor], varies: Sequence[bool], bucket_numel: int
    ):
        self._parameters, self._shards = parameters, shards
        self._ranks = dist.get_world_size()
        self.reached = [False] * len(parameters)
        indices = list(reversed(range(len(parameters))))
        early = self._cut([i for i in indices if not varies[i]], bucket_numel)
        self._buckets = early + self._cut([i for i in indices if varies[i]], bucket_numel)
        self._early = len(early)
        self._ready: dict[int, Tensor] = {}
        self._next = 0  # bucket
        self._sent: _Sent | None = None
        self._hooks = [
            p.register_post_accumulate_grad_hook(lambda p, index=index: self._take(index, p))
            for index, p in enumerate(parameters)
        ]

    def forget(self) -> None:
        """Begin an inner step: no parameter has been reached."""
        self.reached = [False] * len(self._parameters)

    def finish(self) -> None:
        """Send what is left of this backward pass and wait until every shard has it."""
        for bucket in self._buckets[self._next :]:
            self._send(bucket)
        self._receive()
        self._next = 0

    def close(self) -> None:
        """Take the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()

    def _cut(self, indices: Sequence[int], bucket_numel: int) -> list[list[int]]:
        buckets: list[list[int]] = []
        numel = bucket_numel
        for index in indices:
            if numel >= bucket_numel:
                buckets.append([])
                numel = 0
            buckets[-1].append(index)
            numel += self._parameters[index].ds_numel
        return buckets

    def _take(self, index: int, parameter: nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad.detach().reshape(-1), None
        self.reached[index] = True
        if self._ranks == 1:
            self._shards[index].add_(gradient)
            return
        self._ready[index] = gradient
        while self._next < self._early and all(i in self._ready for i in self._buckets[self._next]):
            self._send(self._buckets[self._next])
            self._next += 1

    def _send(self, bucket: Sequence[int]) -> None:
        """Start the reduce-scatter of a bucket; the one before it is waited for."""
        if self._ranks == 1:
            return
        sizes = [self._parameters[index].ds_tensor.ds_numel for index in bucket]
        rows = torch.zeros(self._ranks, sum(sizes), dtype=torch.float32, device=self._shards[bucket[0]].device)
        for index, size, columns in zip(bucket, sizes, rows.split(sizes, dim=1), strict=True):
            gradient = self._ready.pop(index, None)
            if gradient is not None:
                for rank, part in enumerate(gradient.split(size)):
                    columns[rank, : part.numel()].copy_(part)
        self._receive()
        mine = torch.empty_like(rows[0])
        work = dist.reduce_scatter_tensor(mine, rows.view(-1), op=dist.ReduceOp.SUM, async_op=True)
        self._sent = _Sent(list(zip(bucket, sizes, strict=True)), mine, rows, work)

    def _receive(self) -> None:
        """Wait for the bucket on its way and add it to the shards."""
        if self._sent is None:
            return
        bucket, self._sent = self._sent, None
        bucket.work.wait()
        for (index, _), part in zip(bucket.members, bucket.mine.split([s for _, s in bucket.members]), strict=True):
            shard = self._shards[index]
            shard.add_(part[: shard.numel()])

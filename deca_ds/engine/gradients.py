"""Reduce the active block's gradients to this rank's float32 shard while the backward pass runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deca_ds.engine import internals
from deca_ds.engine.masters import add_into


@dataclass
class _Bucket:
    """One reduce-scatter: row r holds, part after part, what rank r gets. parts: (parameter, first element of a rank's
    slice, elements), elements padding included."""

    rows: Tensor
    parts: list[tuple[int, int, int]] = field(default_factory=list)
    filled: int = 0  # columns


@dataclass
class _Sent:
    """A bucket on its way. work: waits for it. mine: this rank's row of the sum."""

    bucket: _Bucket
    work: dist.Work
    mine: Tensor


class GradientReducer:
    """Sums gradients over the client's ranks into float32 shards, bucket by bucket, as autograd produces them.

    parameters: of the model's active block, in one order on all ranks. shards: for each, this rank's 1-D float32 slice,
    which the summed gradient is added to. leaves: for each, the module that ZeRO-3 gathers as a whole, if it belongs to
    one: what runs in there may differ from rank to rank (an expert that gets no tokens). bucket_numel: elements that
    are reduced together; a bucket may hold parts of parameters. reached: whether each has had a gradient on this rank
    since `forget`.

    Ranks must agree about which collective comes next and what it holds, among those with which ZeRO-3 gathers during
    the backward pass. Therefore gradients are sent in an order that is known before the first one comes, the reverse of
    the order in which the forward pass has just called the modules, and this is the order in which autograd makes them.
    One that comes out of turn is kept until its turn. One of a leaf, which may not come on this rank, is sent when the
    next gradient is that is sure to come on all ranks: as that module ran before the leaf, autograd is through with the
    leaf. Parameters whose module was not called, or calls others that have parameters of the block, so that its
    gradients may come at any time, are sent at the end. What does not come counts as zero.

    So at any time there are one float32 bucket that is being filled, one that is on its way, and the gradients that
    are kept. With one rank a gradient is added to its shard at once.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        shards: Sequence[Tensor],
        leaves: Sequence[nn.Module | None],
        bucket_numel: int,
    ):
        self._parameters, self._shards, self._leaves = parameters, shards, leaves
        self._ranks = dist.get_world_size()
        self._width = max(1, bucket_numel // self._ranks)  # columns of a bucket
        self._columns = sum(internals.partitioned(parameter).ds_tensor.ds_numel for parameter in parameters)
        self.forget()
        hooks: list[RemovableHandle] = [
            p.register_post_accumulate_grad_hook(lambda p, index=index: self._take(index, p))
            for index, p in enumerate(parameters)
        ]
        if self._ranks > 1:
            hooks += [
                module.register_forward_pre_hook(self._noting(own))
                for module, own in _callers(model, parameters, leaves).items()
            ]
        self._hooks = hooks

    def forget(self) -> None:
        """Begin an inner step: no parameter has been reached."""
        self.reached = [False] * len(self._parameters)
        self._begin()

    def finish(self) -> None:
        """Send what is left of this backward pass and wait until every shard has it."""
        if self._ranks > 1:
            self._send_before(len(self._parameters))
            self._receive()
        self._begin()

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def _begin(self) -> None:
        """Expect a forward pass."""
        self._called: dict[int, None] = {}  # parameters, in the order of the calls of their modules
        self._order: list[int] | None = None  # of sending, once the backward pass has begun
        self._next = 0  # place in it
        self._left = self._columns
        self._kept: dict[int, Tensor] = {}
        self._filling: _Bucket | None = None
        self._sent: _Sent | None = None

    def _noting(self, own: Sequence[int]) -> Callable[..., None]:
        """A hook that notes a call of the module with these parameters in the forward pass."""

        def note(*_: object) -> None:
            if self._order is None:
                self._called.update(dict.fromkeys(own))

        return note

    def _take(self, index: int, parameter: nn.Parameter) -> None:
        self.reached[index] = True
        if self._ranks == 1:
            add_into(self._shards[index], _take_gradient(parameter))
            return
        order = self._fix_order()
        if index in order[: self._next]:
            shape = tuple(internals.partitioned(parameter).ds_shape)
            raise RuntimeError(f"a gradient of shape {shape} came after its turn to be reduced")
        self._keep(index, parameter)
        while (place := self._next_sure()) is not None and order[place] in self._kept:
            self._send_before(place + 1)

    def _keep(self, index: int, parameter: nn.Parameter) -> None:
        gradient = _take_gradient(parameter)
        self._kept[index] = self._kept[index] + gradient if index in self._kept else gradient

    def _fix_order(self) -> list[int]:
        if self._order is None:
            self._sure = len(self._called)  # places before this one have a time to be sent at
            rest = (index for index in range(len(self._parameters)) if index not in self._called)
            self._order = [*reversed(self._called), *reversed(list(rest))]
        return self._order

    def _next_sure(self) -> int | None:
        """Place of the next parameter outside leaves that need not wait for the end."""
        order = self._fix_order()
        return next((k for k in range(self._next, self._sure) if self._leaves[order[k]] is None), None)

    def _send_before(self, place: int) -> None:
        """Put the parameters before this place of the order into buckets; send those that are full, and the last."""
        for index in self._fix_order()[self._next : place]:
            self._put(index)
        self._next = place

    def _put(self, index: int) -> None:
        gradient = self._kept.pop(index, None)
        size = internals.partitioned(self._parameters[index]).ds_tensor.ds_numel
        start = 0
        while start < size:
            bucket = self._filling
            if bucket is None:
                columns = min(self._width, self._left)
                rows = torch.empty(self._ranks, columns, dtype=torch.float32, device=self._shards[index].device)
                bucket = self._filling = _Bucket(rows)
            count = min(size - start, bucket.rows.shape[1] - bucket.filled)
            target = bucket.rows.narrow(1, bucket.filled, count)
            if gradient is None:
                target.zero_()
            else:
                _fill(target, gradient, size, start)
            bucket.parts.append((index, start, count))
            bucket.filled += count
            start += count
            if start == size:
                gradient = None  # the bucket may be sent next, and takes more then
            if bucket.filled == bucket.rows.shape[1]:
                self._filling = None
                self._send(bucket)

    def _send(self, bucket: _Bucket) -> None:
        """Start the reduce-scatter of the full bucket; the one before it is waited for."""
        self._receive()
        mine = torch.empty_like(bucket.rows[0])
        work = dist.reduce_scatter_tensor(mine, bucket.rows.view(-1), op=dist.ReduceOp.SUM, async_op=True)
        assert work is not None, "this rank is part of the group"
        self._left -= bucket.filled
        self._sent = _Sent(bucket, work, mine)

    def _receive(self) -> None:
        """Wait for the bucket on its way and add it to the shards."""
        if self._sent is None:
            return
        sent, self._sent = self._sent, None
        sent.work.wait()
        parts = sent.bucket.parts
        for (index, start, _), part in zip(parts, sent.mine.split([p[2] for p in parts]), strict=True):
            target = self._shards[index][start : start + part.numel()]
            target.add_(part[: target.numel()])


def _fill(rows: Tensor, gradient: Tensor, size: int, start: int) -> None:
    """Copy of every rank's slice of the gradient, of `size` elements, those from `start` on that its row has room for.

    Beyond the gradient's end there is padding, which stays as it is.
    """
    for rank, row in enumerate(rows):
        part = gradient[rank * size + start : min((rank + 1) * size, rank * size + start + row.numel())]
        row[: part.numel()].copy_(part)


def _take_gradient(parameter: nn.Parameter) -> Tensor:
    """What autograd has just left on the parameter, 1-D; it stays there no longer."""
    assert parameter.grad is not None
    gradient, parameter.grad = parameter.grad.detach().reshape(-1), None
    return gradient


def _callers(
    model: nn.Module, parameters: Sequence[nn.Parameter], leaves: Sequence[nn.Module | None]
) -> dict[nn.Module, list[int]]:
    """Modules that use parameters of the block, by index, while they run and call none that does so itself: leaves,
    and outside these the modules at the ends of the tree."""
    places = {id(parameter): index for index, parameter in enumerate(parameters)}
    callers: dict[nn.Module, list[int]] = {}
    for module in model.modules():
        if internals.is_leaf(module):  # several may share parameters, of which one is in `leaves`
            callers[module] = [places[id(p)] for p in module.parameters() if id(p) in places]
    for module in model.modules():
        own = [places[id(p)] for p in module.parameters(recurse=False) if id(p) in places]
        own = [index for index in own if leaves[index] is None]
        if own and not any(id(p) in places for child in module.children() for p in child.parameters()):
            # large ones are sent first
            callers[module] = sorted(own, key=lambda index: internals.partitioned(parameters[index]).ds_numel)
    return callers

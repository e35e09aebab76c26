"""Reduce the active block's gradients to this rank's float32 shard while the backward pass runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
    """A bucket that has been sent. work: waits for the reduction. mine: this rank's row of the sum."""

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
        self._shards, self._in_leaf = shards, [leaf is not None for leaf in leaves]
        self._ranks = dist.get_world_size()
        self._width = max(1, bucket_numel // self._ranks)  # columns of a bucket
        self._sizes = [internals.partitioned(parameter).ds_tensor.ds_numel for parameter in parameters]
        self.reached = [False] * len(parameters)
        self._turns, self._buckets = self._new_pass()
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
        self.reached = [False] * len(self._sizes)
        self._turns, self._buckets = self._new_pass()

    def finish(self) -> None:
        """Send what is left of this backward pass and wait until every shard has it."""
        if self._ranks > 1:
            for index in self._turns.all_left():
                self._buckets.put(index, self._turns.kept)
            self._buckets.receive()
        self._turns, self._buckets = self._new_pass()

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def _new_pass(self) -> tuple[_Turns, _Buckets]:
        """Return the state of a new forward and backward pass."""
        return _Turns(self._in_leaf), _Buckets(self._shards, self._sizes, self._ranks, self._width)

    def _noting(self, own: Sequence[int]) -> Callable[..., None]:
        """Return a hook that notes a call of the module with these parameters in the forward pass."""
        return lambda *_: self._turns.note_call(own)

    def _take(self, index: int, parameter: nn.Parameter) -> None:
        self.reached[index] = True
        if self._ranks == 1:
            add_into(self._shards[index], _take_gradient(parameter))
            return
        if self._turns.is_over(index):
            shape = tuple(internals.partitioned(parameter).ds_shape)
            raise RuntimeError(f"a gradient of shape {shape} came after its turn to be reduced")
        self._turns.keep(index, _take_gradient(parameter))
        for each in self._turns.due():
            self._buckets.put(each, self._turns.kept)


class _Turns:
    """Decides when each gradient of a pass is sent. in_leaf: which parameters belong to a leaf.

    kept: gradients, by parameter, that wait for their turn; the sender takes them out.
    """

    def __init__(self, in_leaf: Sequence[bool]):
        self.kept: dict[int, Tensor] = {}
        self._in_leaf = in_leaf
        self._called: dict[int, None] = {}  # parameters, in the order of the calls of their modules
        self._order: list[int] | None = None  # of sending, once the backward pass has begun
        self._sure = 0  # places before this one have a time to be sent at
        self._next = 0  # place

    def note_call(self, parameters: Sequence[int]) -> None:
        """Note that the forward pass calls the module with these parameters."""
        if self._order is None:
            self._called.update(dict.fromkeys(parameters))

    def is_over(self, index: int) -> bool:
        """Return whether this parameter's turn is over."""
        return index in self._fix_order()[: self._next]

    def keep(self, index: int, gradient: Tensor) -> None:
        """Keep a gradient until its turn; a parameter that is used in two places may get two, which are added."""
        self.kept[index] = self.kept[index] + gradient if index in self.kept else gradient

    def due(self) -> Iterator[int]:
        """Yield the parameters whose turn has come."""
        order = self._fix_order()
        while (place := self._next_sure()) is not None and order[place] in self.kept:
            yield from self._before(place + 1)

    def all_left(self) -> Iterator[int]:
        """Yield the parameters that have not had their turn."""
        return self._before(len(self._in_leaf))

    def _fix_order(self) -> list[int]:
        if self._order is None:
            self._sure = len(self._called)
            rest = (index for index in range(len(self._in_leaf)) if index not in self._called)
            self._order = [*reversed(self._called), *reversed(list(rest))]
        return self._order

    def _next_sure(self) -> int | None:
        """Return the place of the next parameter outside leaves that need not wait for the end of the pass."""
        order = self._fix_order()
        return next((k for k in range(self._next, self._sure) if not self._in_leaf[order[k]]), None)

    def _before(self, place: int) -> Iterator[int]:
        """Yield the remaining parameters before this place of the order."""
        yield from self._fix_order()[self._next : place]
        self._next = place


class _Buckets:
    """Reduces the gradients of a pass into shards, bucket by bucket. sizes: columns of each. width: of a bucket."""

    def __init__(self, shards: Sequence[Tensor], sizes: Sequence[int], ranks: int, width: int):
        self._shards, self._sizes, self._ranks, self._width = shards, sizes, ranks, width
        self._left = sum(sizes)  # columns of which no bucket has been sent
        self._filling: _Bucket | None = None
        self._sent: _Sent | None = None

    def put(self, index: int, kept: dict[int, Tensor]) -> None:
        """Take the gradient of a parameter, zero if there is none, and send the buckets that it fills."""
        gradient = kept.pop(index, None)
        size, start = self._sizes[index], 0
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

    def receive(self) -> None:
        """Wait for the bucket on its way and add it to the shards."""
        if self._sent is None:
            return
        sent, self._sent = self._sent, None
        sent.work.wait()
        parts = sent.bucket.parts
        for (index, start, _), part in zip(parts, sent.mine.split([p[2] for p in parts]), strict=True):
            target = self._shards[index][start : start + part.numel()]
            target.add_(part[: target.numel()])

    def _send(self, bucket: _Bucket) -> None:
        """Start the reduce-scatter of the full bucket; the one before it is waited for."""
        self.receive()
        mine = torch.empty_like(bucket.rows[0])
        work = dist.reduce_scatter_tensor(mine, bucket.rows.view(-1), op=dist.ReduceOp.SUM, async_op=True)
        assert work is not None, "this rank is part of the group"
        self._left -= bucket.filled
        self._sent = _Sent(bucket, work, mine)


def _fill(rows: Tensor, gradient: Tensor, size: int, start: int) -> None:
    """Copy into each rank's row the elements of its slice of the gradient, of `size` elements, from `start` on, as far
    as the row has room.

    Beyond the gradient's end there is padding, which stays as it is.
    """
    for rank, row in enumerate(rows):
        part = gradient[rank * size + start : min((rank + 1) * size, rank * size + start + row.numel())]
        row[: part.numel()].copy_(part)


def _take_gradient(parameter: nn.Parameter) -> Tensor:
    """Remove the gradient that autograd has just left on the parameter, and return it, 1-D."""
    assert parameter.grad is not None
    gradient, parameter.grad = parameter.grad.detach().reshape(-1), None
    return gradient


def _callers(
    model: nn.Module, parameters: Sequence[nn.Parameter], leaves: Sequence[nn.Module | None]
) -> dict[nn.Module, list[int]]:
    """Map modules to the parameters of the block, by index, that they use while they run, without modules that call
    another such module: leaves, and outside these the modules at the ends of the tree."""
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

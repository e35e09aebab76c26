"""A client: a model on ZeRO-3 shards, of which one block at a time has gradients and optimizer state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from deca_ds.algorithm import Block, BlockPlan, LocalSteps, parameter_shapes, squared_norm
from deca_ds.config import Config
from deca_ds.engine import internals
from deca_ds.engine.architecture import find_blocks
from deca_ds.engine.causality import check_causal
from deca_ds.engine.gradients import GradientReducer
from deca_ds.engine.heap import return_freed_memory
from deca_ds.engine.load import zero3_config
from deca_ds.engine.losses import RowScores, check_own_loss, count_targets, excerpt, row_scores, training_loss
from deca_ds.engine.masters import LowBits, join, join_into, low_bits, round_into
from deca_ds.engine.same_modules import SameModules

_TRIED_TOKENS = 256  # of a row, before training
BUCKET_NUMEL = 50_000_000  # elements of gradients that are reduced together: 200 MB


@dataclass
class BlockState:
    """This rank's shard of the active block: 1-D float32 tensors of one layout and length.

    tensors: by name, "theta" (master parameters), "grad" (the gradient, and after the local step what the method's rule
    leaves there) and the rule's buffers. names: the block's parameters, whose slices follow each other without padding;
    ranks with the same index in clients of the same size have the same layout. local_steps: how many each parameter has
    made; weight decay applies to parameters of two and more dimensions. reached: for each parameter, whether a gradient
    has reached it in this inner step, on any of the client's ranks.
    """

    block: Block
    tensors: dict[str, Tensor]
    names: tuple[str, ...]
    local_steps: LocalSteps
    reached: list[bool]

    @property
    def theta(self) -> Tensor:
        """Master parameters."""
        return self.tensors["theta"]

    @property
    def never_reached(self) -> list[str]:
        """Parameters that no gradient has reached since the block became active."""
        return [name for name, made in zip(self.names, self.local_steps.made, strict=True) if not made]

    @property
    def grad(self) -> Tensor:
        """Gradient, or what the rule left in its place."""
        return self.tensors["grad"]

    def part(self, elements: slice) -> dict[str, Tensor]:
        """Return views of the same elements of all tensors."""
        return {name: tensor[elements] for name, tensor in self.tensors.items()}

    def by_parameter(self, tensor: Tensor) -> dict[str, Tensor]:
        """Return views of a flat tensor of this layout, one a parameter."""
        return dict(zip(self.names, tensor.split(list(self.local_steps.sizes)), strict=True))


@dataclass(frozen=True)
class GradientStats:
    """The numbers of one inner step, over all ranks of the client.

    loss: mean over `targets` predicted tokens, in nats, plus the model's auxiliary loss if it has one. tokens: all
    tokens seen, without padding. norm: 2-norm of the block's gradient before clipping. kept: see `Client.kept`, from
    the previous step. by_rank: this rank's own [loss, norm^2, *kept], before the reduction; float64, 1-D.
    """

    loss: float
    targets: int
    tokens: int
    norm: float
    kept: list[float]
    by_rank: Tensor


class Client:
    """The model of one client on ZeRO-3 shards. All ranks of the client must call every method together."""

    def __init__(self, config: Config, model: PreTrainedModel, device: torch.device):
        import deepspeed

        self.device = device
        self.plan: BlockPlan = find_blocks(config, model)
        engine = deepspeed.initialize(model=model, config=zero3_config(config), dist_init_required=False)[0]
        self.model: PreTrainedModel = engine.module
        self._zero = None if internals.keep_shards_whole(engine) else engine.optimizer
        self._same_modules = SameModules(self.model) if dist.get_world_size() > 1 else None
        self._parameters: dict[str, nn.Parameter] = dict(self.model.named_parameters())
        for parameter in self._parameters.values():
            parameter.requires_grad_(False)
        self.shapes: Mapping[str, tuple[int, ...]] = parameter_shapes(self.model)
        shards = {name: internals.shard(parameter) for name, parameter in self._parameters.items()}
        self.dtypes: Mapping[str, torch.dtype] = {name: shard.dtype for name, shard in shards.items()}
        exact = config.model.masters == "exact"
        trained = [name for block in self.plan.blocks for name in block.names]
        halves = {n: shards[n].numel() for n in trained if exact and self.dtypes[n] == torch.bfloat16}
        self._low = LowBits(halves, pinned=device.type == "cuda")
        self._state: BlockState | None = None
        self._reducer: GradientReducer | None = None
        self._kept = torch.zeros(0, dtype=torch.float64, device=device)  # this rank's part of `kept`

    @property
    def active(self) -> BlockState | None:
        """The active block's state, if one is open."""
        return self._state

    def open_block(self, index: int, buffers: Sequence[str]) -> BlockState:
        """Make a block the active one: allocate its float32 masters and zero `buffers`, and switch on gradients for its
        parameters alone. index: in `plan.blocks`."""
        assert self._state is None, "close the active block first"
        block = self.plan.blocks[index]
        names = sorted(block.names, key=lambda name: len(self.shapes[name]) < 2)  # stable: matrices first
        shards = [internals.shard(self._parameters[name]) for name in names]
        sizes = [shard.numel() for shard in shards]
        theta = torch.empty(sum(sizes), dtype=torch.float32, device=self.device)
        for name, shard, part in zip(names, shards, theta.split(sizes), strict=True):
            low = self._low[name].to(self.device, non_blocking=True) if name in self._low else None
            join_into(part, shard.to(self.device), low)
        tensors = {"theta": theta} | {name: torch.zeros_like(theta) for name in ("grad", *buffers)}
        parameters = [self._parameters[name] for name in names]
        for parameter in parameters:
            parameter.requires_grad_(True)
        internals.forget_trace(self._zero)
        leaves = [internals.leaf(parameter) for parameter in parameters]
        self._reducer = GradientReducer(self.model, parameters, tensors["grad"].split(sizes), leaves, BUCKET_NUMEL)
        return_freed_memory()  # what the block before has left: its gradients and activations had other sizes
        local_steps = LocalSteps(sizes, [len(self.shapes[name]) >= 2 for name in names])
        self._state = BlockState(block, tensors, tuple(names), local_steps, [False] * len(names))
        return self._state

    def close_block(self) -> None:
        """End the active block's activation and free its optimizer state. The bits of its masters that rounding took
        from the shards in the last `write_back` are kept on the host."""
        assert self._state is not None and self._reducer is not None
        self._reducer.close()
        for name, theta in self._masters().items():
            self._parameters[name].requires_grad_(False)
            if name in self._low:
                self._low[name].copy_(low_bits(theta))
        internals.forget_trace(self._zero)
        self._state = self._reducer = None

    def gradient(
        self,
        micro_batches: Sequence[Mapping[str, Tensor]],
        clip_norm: float = 0.0,
        tick: Callable[[], None] = lambda: None,
    ) -> GradientStats:
        """Fill the active block's `grad` with the gradient of the mean loss over all of the client's target tokens.

        micro_batches: this rank's part of the client's batch; tensors [rows, tokens] by name ("input_ids",
        "attention_mask", ...). clip_norm: if the gradient's 2-norm over the block is larger, it is scaled down to this;
        0 switches clipping off. A gradient that is not finite is not scaled. tick: called before every micro-batch.
        Also records which parameters a gradient has reached. Leaves the model partitioned.
        """
        assert self._state is not None and self._reducer is not None
        grad = self._state.grad.zero_()
        counts = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch in micro_batches:
            counts[0] += count_targets(batch)
            counts[1] += batch["attention_mask"].sum()
        dist.all_reduce(counts)
        targets = max(1, int(counts[0]))
        self._reducer.forget()
        internals.follow_writes(self._zero)
        if not self.model.training:  # this walks over all modules
            self.model.train()
        total = torch.zeros(1, dtype=torch.float64, device=self.device)
        for batch in micro_batches:
            tick()
            with self._pass("training"):
                loss = training_loss(self.model, batch, self.device, targets)
            if loss.requires_grad:  # else no parameter of the block takes part in it
                loss.backward()
            total += loss.detach()
            self._reducer.finish()
            internals.partition_all(self._zero)
        reached = torch.tensor(self._reducer.reached, dtype=torch.float64, device=self.device)
        own = torch.cat([total, squared_norm(grad).reshape(1), self._kept])
        summed = torch.cat([own, reached])
        dist.all_reduce(summed)
        sums = summed.tolist()
        (total_loss, squared, *kept), ranks_reached = sums[: len(own)], sums[len(own) :]
        self._state.reached = [ranks > 0 for ranks in ranks_reached]
        norm = math.sqrt(squared)
        if 0 < clip_norm < norm < math.inf:
            grad.mul_(clip_norm / norm)
        return GradientStats(total_loss, targets, int(counts[1]), norm, kept, own)

    def _pass(self, kind: str) -> AbstractContextManager[None]:
        """Return the context of a forward pass, which raises ModelError if ranks run different modules in it."""
        return nullcontext() if self._same_modules is None else self._same_modules.watched(kind)

    def kept(self) -> tuple[list[float], Tensor]:
        """Return what shows whether the block's state was finite at the last `write_back`: the squared 2-norm of theta
        and the sum of each buffer, over all ranks, and on this rank (float64, 1-D). The next `gradient` returns the
        same without a reduction of its own."""
        summed = self._kept.clone()
        dist.all_reduce(summed)
        return summed.tolist(), self._kept

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the active block's masters into the model's shards; the next gather sees them."""
        assert self._state is not None
        theta, *buffers = (tensor for name, tensor in self._state.tensors.items() if name != "grad")
        sums = [squared_norm(theta), *(buffer.sum().double() for buffer in buffers)]
        self._kept = torch.stack(sums)
        for name, part in self._masters().items():
            round_into(internals.shard(self._parameters[name]), part)

    @torch.no_grad()
    def score(self, batch: Mapping[str, Tensor]) -> RowScores:
        """Return how well the model predicts the targets of each row of the batch."""
        internals.follow_writes(self._zero)
        self.model.eval()
        with self._pass("scoring"):
            return row_scores(self.model, batch, self.device)

    def check_loss(self, batch: Mapping[str, Tensor], others: Iterable[Mapping[str, Tensor]] = ()) -> None:
        """Raise ModelError unless the model's class computes the loss that is trained here, its attention is causal
        and, where the client has several ranks, other batches run the same modules. batch: with targets. A part of
        each row is tried: the class's own loss takes the logits of all positions."""
        batch, *others = (excerpt(each, _TRIED_TOKENS) for each in (batch, *others))
        internals.follow_writes(self._zero)
        self.model.eval()
        if self._same_modules is not None:
            self._try_modules([batch, *others])
        check_own_loss(self.model, batch, self.device)
        check_causal(self.model, batch["input_ids"][0].to(self.device))
        self.end_scoring()

    @torch.no_grad()
    def _try_modules(self, batches: Sequence[Mapping[str, Tensor]]) -> None:
        """Raise ModelError unless batches, the same on all ranks, run the same modules. The first one decides which
        modules later ones have to run, in scoring and in training, whose random numbers stay as they are."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), self._pass("training"):
            training_loss(self.model.train(), batches[0], self.device, max(1, count_targets(batches[0])))
        for batch in batches:
            self.score(batch)

    def end_scoring(self) -> None:
        """Release what evaluation left gathered; call once after a series of `score`."""
        internals.partition_all(self._zero)

    def shards(self, names: Sequence[str]) -> Iterator[tuple[str, int, int, Tensor]]:
        """Yield (name, start, stop, values) of this rank's slices; values write through to the model."""
        for name in names:
            parameter = self._parameters[name]
            yield name, *internals.shard_range(parameter), internals.shard(parameter)

    def low_bits(self, names: Sequence[str]) -> Iterator[tuple[str, int, Tensor]]:
        """Yield (name, start, bits) of this rank's slices of the parameters that have masters beside their shards: the
        16 bits that rounding took from each master, int16 on the host, as views. Out of date for the active block."""
        for name in (name for name in names if name in self._low):
            yield name, internals.shard_range(self._parameters[name])[0], self._low[name]

    def masters(self, names: Sequence[str]) -> Iterator[tuple[str, int, int, Tensor, Tensor | None]]:
        """Yield (name, start, stop, values, low bits) of this rank's slices; `masters.join` makes masters of the
        last two. Low bits are None for the active block, whose values are the masters, and for parameters without
        masters."""
        active = self._masters()
        for name, start, stop, shard in self.shards(names):
            held = (active[name], None) if name in active else (shard, self._low.get(name))
            yield name, start, stop, *held

    def set_master(self, name: str, values: Tensor) -> None:
        """Overwrite this rank's slice of a parameter with float32 masters, or with values of its own dtype; if it is
        active, in the block's state too."""
        if (active := self._masters().get(name)) is not None:
            active.copy_(values)
        round_into(internals.shard(self._parameters[name]), values)
        if name in self._low:
            self._low[name].copy_(low_bits(values.float()))

    def _masters(self) -> dict[str, Tensor]:
        """Return the active block's masters, by parameter; empty if no block is active."""
        return {} if self._state is None else self._state.by_parameter(self._state.theta)

    def block_shards(self) -> Iterator[tuple[str, int, int, dict[str, Tensor]]]:
        """Yield (name, start, stop, state) of this rank's slices of the active block, if there is one; state: views of
        all of the block's tensors."""
        if self._state is None:
            return
        parts = {key: self._state.by_parameter(tensor) for key, tensor in self._state.tensors.items()}
        for name in self._state.names:
            state = {key: part[name] for key, part in parts.items()}
            yield name, *internals.shard_range(self._parameters[name]), state

    def block_numels(self) -> list[int]:
        """Return the number of elements of each parameter of the active block, over all ranks, in the order of the
        shard."""
        assert self._state is not None
        return [prod(self.shapes[name]) for name in self._state.names]

    def buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Yield persistent buffers, which are part of a saved model and whole on every rank."""
        saved = self.model.state_dict(keep_vars=True)
        return ((name, buffer) for name, buffer in self.model.named_buffers() if name in saved)

    @contextmanager
    def borrowed_shards(self, names: Sequence[str]) -> Iterator[list[tuple[Tensor, Callable[[slice], Tensor]]]]:
        """Lend the values of `shards` to be overwritten; they are restored at the end.

        Each comes with a function that copies the float32 masters of a slice of its elements, as they were before, to
        the host.
        """
        active = self._masters()
        own = {name: (shard, shard.to("cpu", copy=True)) for name, _, _, shard in self.shards(names)}

        def masters(name: str, elements: slice) -> Tensor:
            if name in active:
                return active[name][elements].to("cpu", copy=True)
            low = self._low.get(name)
            return join(own[name][1][elements], None if low is None else low[elements])

        try:
            yield [(shard, partial(masters, name)) for name, (shard, _) in own.items()]
        finally:
            for shard, values in own.values():
                shard.copy_(values)

    def client_sum(self, value: float) -> float:
        """Sum `value` over this client's ranks."""
        tensor = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return float(tensor)

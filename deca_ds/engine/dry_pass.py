"""What the passes of a micro-batch allocate, found by running the model on tensors that have shapes and no values.

Torch's fake tensors of the CPU take the same paths as real ones there, and attention without a matrix of scores as on a
GPU. Nothing of the model is loaded, and parameters count as nothing here: ZeRO-3 decides what they take.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PretrainedConfig, masking_utils

from deca_ds.config import Config
from deca_ds.engine.adapters import add_adapters
from deca_ds.engine.architecture import DTYPES, expert_lists, meta_model
from deca_ds.engine.chunked_loss import positions_at_a_time, positions_of_a_piece, summed_loss
from deca_ds.engine.heap import kept_below
from deca_ds.engine.losses import has_auxiliary, losses_of
from deca_ds.engine.output_head import OutputHead, find_head

_TRACEABLE = ("eager", "sdpa")  # implementations of attention that run without values; others take what sdpa takes


class NotWithoutValues(Exception):
    """The model's forward pass asks for values, or torch cannot tell an operation's shapes."""


@dataclass(frozen=True)
class PassMemory:
    """Bytes of one micro-batch beside parameters. saved: what the body leaves for the backward pass. forward, loss,
    backward: the most at a time in the body, in the head and loss, and in the backward pass, `saved` included. kept: on
    a CPU, what the C library keeps after the passes; forward, loss and backward include it, as it is there from the
    second micro-batch on."""

    saved: int
    forward: int
    loss: int
    backward: int
    kept: int


class DryModel:
    """The model of a configuration without values. Its methods raise NotWithoutValues. gpu: whether it runs on one.

    calls: of every module that ZeRO-3 knows, in the order of the forward pass, the names of the parameters that it
    gathers for the module, if there are any.
    """

    def __init__(self, config: Config, architecture: PretrainedConfig, gpu: bool):
        options: dict[str, Any] = {"dtype": DTYPES[config.model.dtype]}
        options["trust_remote_code"] = config.model.trust_remote_code
        if config.model.attention:
            known = config.model.attention in _TRACEABLE
            options["attn_implementation"] = config.model.attention if known else "sdpa"
        found = find_head(meta_model(config.model, architecture))
        self._mode = FakeTensorMode()
        with _without_values(self._mode):
            self._model = AutoModelForCausalLM.from_config(architecture, **options)
            add_adapters(config, self._model)
        self._model.requires_grad_(False)
        self._packed, self._gpu = config.data.packing, gpu
        self._known: dict[tuple[tuple[str, ...], int, int, bool], PassMemory] = {}
        self._head = None if found is None else OutputHead(self._model.get_output_embeddings(), found.switches)
        self.calls: list[tuple[str, ...]] = []
        self._record_calls()

    def training(self, trained: Sequence[str], rows: int, length: int, checkpointing: bool = False) -> PassMemory:
        """Measure a forward and a backward pass of `rows` sequences of `length` tokens; trained: names of parameters.

        checkpointing: of gradients, whatever is configured.
        """
        asked = (tuple(trained), rows, length, checkpointing)
        if asked not in self._known:
            self._checkpoint(checkpointing)
            self._known[asked] = self._passes(trained, rows, length)
        return self._known[asked]

    def _passes(self, trained: Sequence[str], rows: int, length: int) -> PassMemory:
        parameters = dict(self._model.named_parameters())
        active = [parameters[name] for name in trained]
        self._require(active, True)
        drop = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in active]
        self._model.train()
        try:
            with self._allocated(rows) as allocated:
                peaks: list[int] = []
                saved: list[int] = []

                def at_head(*_: object) -> None:
                    saved.append(allocated.level)
                    peaks.append(allocated.take_peak())

                loss = self._loss(rows, length, at_head)
                peaks.append(allocated.take_peak())
                if loss.requires_grad:
                    loss.backward()
                peaks.append(allocated.take_peak())
        finally:
            self._require(active, False)
            for hook in drop:
                hook.remove()
        *before, after = (allocated.kept + peak for peak in peaks)
        # of a model without a head of its own all is its forward
        return PassMemory(saved[0] if saved else before[0], before[0], before[-1], after, allocated.kept)

    @torch.no_grad()
    def scoring(self, rows: int, length: int) -> tuple[int, int]:
        """Measure an evaluation's pass over `rows` sequences of `length` tokens. Returns what the C library keeps after
        it (see PassMemory), and the most bytes held at a time beside that."""
        self._model.eval()
        with self._allocated(rows) as allocated:
            self._loss(rows, length, lambda *_: None)
            return allocated.kept, allocated.take_peak()

    def _loss(self, rows: int, length: int, at_head: Callable[..., None]) -> Tensor:
        ids = torch.zeros(rows, length, dtype=torch.int64)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        head, linear = self._head, self._model.get_output_embeddings()
        hooks = [] if linear is None else [linear.register_forward_pre_hook(at_head)]
        try:
            if head is None:
                return losses_of(self._model(**inputs).logits, ids)[0].sum()
            # later chunks take no more
            first = torch.zeros(min(ids.numel(), positions_at_a_time(head, self._gpu)), dtype=torch.int64)
            piece = positions_of_a_piece(head, self._gpu)
            return head.run(
                self._model, lambda hidden: summed_loss(self._model, head, hidden, [(first, first)], piece, 1), inputs
            )[0].sum()
        finally:
            for hook in hooks:
                hook.remove()

    def _record_calls(self) -> None:
        names = {id(p): name for name, p in self._model.named_parameters()}
        whole = expert_lists(self._model)
        inside = {id(m) for module in whole for m in module.modules() if m is not module}
        hooks = []
        for module in self._model.modules():
            used = tuple(names[id(p)] for p in module.parameters(recurse=any(module is each for each in whole)))
            if id(module) not in inside:
                hooks.append(module.register_forward_pre_hook(lambda *_, used=used: self.calls.append(used)))
        self.scoring(1, 8)
        for hook in hooks:
            hook.remove()

    def _checkpoint(self, wanted: bool) -> None:
        if wanted == self._model.is_activation_checkpointing:
            return
        if wanted:
            self._model.activation_checkpointing_enable({"use_reentrant": False})
            self._model.disable_input_require_grads()
        else:
            self._model.activation_checkpointing_disable()

    def _require(self, parameters: Sequence[nn.Parameter], gradient: bool) -> None:
        for parameter in parameters:
            parameter.requires_grad_(gradient)

    @contextmanager
    def _allocated(self, rows: int) -> Iterator[_Allocated]:
        own = (*self._model.parameters(), *self._model.buffers())
        # rows of different lengths, and a mask that tells
        padded = rows > 1 and not self._packed and has_auxiliary(self._model)
        allocated = _Allocated((tensor.untyped_storage() for tensor in own), 0 if self._gpu else kept_below())
        with _without_values(self._mode), _masks(padded), allocated:
            yield allocated


@contextmanager
def _without_values(mode: FakeTensorMode) -> Iterator[None]:
    logger = logging.getLogger("torch._subclasses.fake_tensor")  # it prints tracebacks of what is raised here
    was, logger.disabled = logger.disabled, True
    try:
        with mode:
            yield
    except RuntimeError as error:
        raise NotWithoutValues(str(error)) from error
    finally:
        logger.disabled = was


@contextmanager
def _masks(padded: bool) -> Iterator[None]:
    """Have transformers make a mask of the size of the attention scores if rows are padded, else none."""
    was = masking_utils.is_tracing, masking_utils.fast_all
    masking_utils.is_tracing = lambda *_: False
    masking_utils.fast_all = lambda _: not padded  # type: ignore[assignment, return-value]  # its truth is what is asked
    try:
        yield
    finally:
        masking_utils.is_tracing, masking_utils.fast_all = was


class _Allocated(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make while it is active. level: bytes of the tensors that are
    alive. kept: the most at a time of those smaller than `kept_below`, whose memory stays when they are freed.

    beside: storages that do not count.
    """

    def __init__(self, beside: Iterable[UntypedStorage], kept_below: int):
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it without types
        self._known: dict[int, object] = {id(storage): storage for storage in beside}
        self._kept_below = kept_below
        self._returned = self._peak = self._small = 0  # bytes alive of the others, their peak; of those that are kept
        self.kept = 0

    @property
    def level(self) -> int:
        return self._returned + self._small

    def take_peak(self) -> int:
        """Return the most at a time, since the last call, of tensors whose memory does not stay."""
        peak, self._peak = self._peak, self._returned
        return peak

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.add_.Tensor:
            return args[0]  # nothing to allocate; adding gradients up piece by piece has thousands
        result = func(*args, **(kwargs or {}))
        # autograd adds up the gradients of a parameter that has several uses in place, but not those of fake tensors
        in_place = func is torch.ops.aten.add.Tensor and torch._C._current_graph_task_id() >= 0
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage(), to_peak=not in_place)
        return result

    def _count(self, storage: UntypedStorage, to_peak: bool) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return

        def freed(_: object) -> None:
            del self._known[key]
            self._add(-size, size)

        self._known[key] = weakref.ref(storage, freed)
        self._add(size, size)
        if to_peak:
            self._peak, self.kept = max(self._peak, self._returned), max(self.kept, self._small)

    def _add(self, change: int, size: int) -> None:
        if size < self._kept_below:
            self._small += change
        else:
            self._returned += change


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None

"""The output head of a model: the linear layer after the body, and what the model makes of that layer's output."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_PROBED = 4  # positions


@dataclass(frozen=True)
class OutputHead:
    """The head of a model whose forward is a body, one linear layer, and arithmetic on each position by itself.

    linear: the layer, hidden states [batch, length, hidden] -> [batch, length, vocabulary]. switches: keyword arguments
    that have the model's forward compute nothing but logits. The methods take the model; it is not held.
    """

    linear: nn.Linear
    switches: Mapping[str, bool]

    def logits(self, model: nn.Module, output: Tensor) -> Tensor:
        """Return the model's logits at n positions, [n, vocabulary], from the output that its linear layer has there.

        The model's own forward scales, caps or shifts them: it runs with stand-ins in place of all its modules, of
        which the head's returns `output`. So neither the body nor the layer runs, and no hook.
        """
        return self._logits(model, output, 0)

    def run(
        self, model: nn.Module, compute: Callable[[Tensor], Tensor], inputs: Mapping[str, Any]
    ) -> tuple[Tensor, Any]:
        """Run the model with `compute` in place of the linear layer's arithmetic; returns its result and the outputs.

        compute: hidden states -> a tensor of three dimensions. It runs where the layer would, between its hooks: ZeRO-3
        has gathered the layer's parameters, and gathers them for the backward pass of the result. The logits among the
        outputs mean nothing.
        """
        results: list[Tensor] = []
        hook = self.linear.register_forward_hook(lambda _module, _inputs, result: results.append(result))
        vars(self.linear)["forward"] = compute  # the instance's, before its class's
        try:
            outputs = model(**inputs)
        finally:
            del self.linear.forward
            hook.remove()
        (result,) = results
        return result, outputs

    def _logits(self, model: nn.Module, output: Tensor, token: int) -> Tensor:
        run = _Run(self.linear, output.unsqueeze(0))
        ids = torch.full((1, len(output)), token, device=output.device)
        modules = model._modules
        stand_ins: dict[str, Any] = {n: m if m is None else _StandIn(m, run) for n, m in modules.items()}
        model._modules = stand_ins
        try:
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
            logits = model.forward(**inputs, **self.switches).logits
        finally:
            model._modules = modules
        if not run.reached or not isinstance(logits, Tensor) or logits.shape[:2] != ids.shape:
            raise _AnotherForward
        return logits.squeeze(0)


def find_head(model: nn.Module) -> OutputHead | None:
    """Return the model's output head, or None where its forward is anything else than body and head. The body does not
    run.

    The model may be on the meta device or partitioned by ZeRO-3.
    """
    if model not in _found:
        _found[model] = _find_head(model)
    return _found[model]


_found: WeakKeyDictionary[nn.Module, OutputHead | None] = WeakKeyDictionary()


class _AnotherForward(Exception):
    """The forward of a model is not a body followed by a head."""


# what a forward may raise that does more with its modules' outputs than stand-ins bear
_ANOTHER = (_AnotherForward, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def _find_head(model: nn.Module) -> OutputHead | None:
    get = getattr(model, "get_output_embeddings", None)
    linear = None if get is None else get()
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        return None
    if next(model.parameters(recurse=False), None) is not None:
        return None
    accepted = inspect.signature(model.forward).parameters
    head = OutputHead(linear, {"output_router_logits": False} if "output_router_logits" in accepted else {})
    device = torch.device("cpu") if linear.weight.is_meta else linear.weight.device
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(_PROBED, linear.out_features, generator=generator).to(device, linear.weight.dtype)
    try:
        # other tokens than those of the parts: logits must not depend on them; a gradient: it must pass
        with torch.enable_grad():
            whole = head._logits(model, output.clone().requires_grad_(), 1)
        parts = torch.cat([head.logits(model, part) for part in output.split(_PROBED // 2)])
    except _ANOTHER:
        return None
    return head if whole.requires_grad and torch.allclose(whole, parts) else None


class _Run:
    """One run of a model's forward with stand-ins. linear: the head's layer. output: what that layer returns in the
    run, [1, n, v]."""

    def __init__(self, linear: nn.Linear, output: Tensor):
        self.linear, self.output = linear, output
        self.reached = False

    def call(self, module: nn.Module) -> Any:
        if self.reached:  # what comes after the head has parameters of its own
            raise _AnotherForward
        if module is not self.linear:
            return _BodyOutput(self.output.new_zeros(1, 1, 1).expand(1, self.output.shape[1], self.linear.in_features))
        self.reached = True
        return self.output


class _StandIn:
    """Takes a module's place in a run. Attributes are those of the module; its submodules come as stand-ins."""

    def __init__(self, module: nn.Module, run: _Run):
        self._module, self._run = module, run

    def __call__(self, *_arguments: Any, **_options: Any) -> Any:
        return self._run.call(self._module)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if isinstance(value, nn.Parameter) and self._module is not self._run.linear:
            raise _AnotherForward
        return _StandIn(value, self._run) if isinstance(value, nn.Module) else value


class _BodyOutput:
    """Hidden states of the right shape, and None for all else that a body may return."""

    def __init__(self, hidden: Tensor):
        self.last_hidden_state = hidden

    def __getitem__(self, place: int) -> Tensor:
        return (self.last_hidden_state,)[place]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None

"""Random weights by the model's own rules: the same values on every device, for any number of ranks and simulated.

transformers draws them where the parameters are, one after the other, so that they depend on the device, on the data
type and on what was drawn before. Here each module's rule runs on float32 tensors on the CPU, with a random state of
its own that follows from the seed and the module's name, and its parameters take the values over, in their data type.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deca_ds.engine import internals
from deca_ds.errors import ModelError

_Rule = Callable[[nn.Module], None]
_Drawn = list[tuple[nn.Module, str, nn.Parameter, Tensor]]  # module, name in it, parameter, its values


@contextmanager
def nothing_drawn() -> Iterator[None]:
    """Keep models that are made meanwhile from drawing their weights; only their modules' constructors may still do
    so."""
    with patch.object(PreTrainedModel, "_initialize_weights", lambda *_: None):
        yield


@torch.no_grad()
def draw_weights(model: PreTrainedModel, seed: int) -> None:
    """Draw all weights of the model, ordinary or partitioned by ZeRO-3; every rank draws all of them.

    A module's rule sees its own parameters and those of its direct children, as under ZeRO-3 in transformers; on the
    host are, as float32, those of one module at a time, of its children and of what stands beside those above it, such
    as the embeddings. Vectors that no rule draws keep the value that they were made with; for a matrix of which that is
    true, and for anything drawn in part, ModelError is raised, because ZeRO-3 leaves such a matrix undefined.
    """
    done: set[nn.Parameter] = set()
    with torch.random.fork_rng(devices=[]):
        _finish(_draw(model, "", model._init_weights, seed, done))


def _draw(module: nn.Module, name: str, rule: _Rule, seed: int, done: set[nn.Parameter]) -> _Drawn:
    """Draw a module after its children; returns its own parameters, which the rule of its parent may still change."""
    children: _Drawn = []
    for key, child in module.named_children():
        inner = child._init_weights if isinstance(child, PreTrainedModel) else rule
        children += _draw(child, f"{name}.{key}", inner, seed, done)
    own = [
        (module, key, p, torch.full(_shape(p), torch.nan, dtype=torch.float32, device="cpu"))
        for key, p in _floating(module)
    ]
    with _in_place(children + own):
        seed_for(seed, name)
        rule(module)
    reset: Callable[[], None] | None = getattr(module, "reset_parameters", None)
    if any(_undrawn(values) for *_, values in own) and reset is not None:
        _draw_as_constructed(reset, own, lambda: seed_for(seed, name))
    _finish(children)
    first = [entry for entry in own if entry[2] not in done]  # a tied parameter is that of the module that has it first
    done.update(parameter for _, _, parameter, _ in first)
    return first


def _draw_as_constructed(reset: Callable[[], None], own: _Drawn, reseed: Callable[[], None]) -> None:
    """Draw values by torch's rule, the module's `reset`, where the model's rule leaves them to the constructor."""
    fresh = [(module, key, parameter, torch.empty_like(values)) for module, key, parameter, values in own]
    with _in_place(fresh):
        reseed()
        reset()
    for (*_, values), (*_, constructed) in zip(own, fresh, strict=True):
        if values.isnan().all():
            values.copy_(constructed)


@contextmanager
def _in_place(drawn: _Drawn) -> Iterator[None]:
    """Have modules hold the values in place of their parameters."""
    try:
        for module, key, _, values in drawn:
            module._parameters[key] = nn.Parameter(values, requires_grad=False)
        yield
    finally:
        for module, key, parameter, _ in drawn:
            module._parameters[key] = parameter


def _finish(drawn: _Drawn) -> None:
    for module, key, parameter, values in drawn:
        missing = _undrawn(values)
        if missing and (missing < values.numel() or values.dim() > 1):
            raise ModelError(
                f"the rules for random weights leave out {key} {tuple(values.shape)} of {type(module).__name__}",
                where="model.init",
                fix="make the model with random weights by its own code, save it, and set model.init=pretrained",
            )
        if not missing:
            internals.overwrite(parameter, values)


def _undrawn(values: Tensor) -> int:
    """Return how many elements no rule has drawn."""
    return int(values.isnan().sum()) if values.sum().isnan() else 0


def seed_for(seed: int, name: str) -> None:
    """Seed the generator from which the module `name` of a model with this `seed` draws."""
    drawn = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    torch.default_generator.manual_seed(int.from_bytes(drawn, "little") >> 1)


def _floating(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(key, p) for key, p in module._parameters.items() if p is not None and p.is_floating_point()]


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))

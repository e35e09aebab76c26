"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685) on a frozen model, for methods that train nothing else.

A linear layer W x becomes W x + scale B A x, with scale = alpha / rank; A starts random, B at zero. peft has the
layers, and is imported nowhere else.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from deca_ds.algorithm import METHODS, Block, BlockPlan, find_layers, parameter_shapes
from deca_ds.config import Config
from deca_ds.errors import ConfigError, ModelError

_NAME = "default"  # peft can keep several adapters on a layer


@dataclass(frozen=True)
class Adapter:
    """What stands beside one weight W: W + scale B A, with W [out, in], A [rank, in] and B [out, rank].

    weight: the name of W in the model without adapters. a, b: names of A and B. transposed: W is [in, out], as in
    GPT-2. renamed: for every tensor of the layer, its name without adapters -> its name with them.
    """

    weight: str
    a: str
    b: str
    scale: float
    transposed: bool
    renamed: Mapping[str, str]


def require_peft() -> None:
    """Raise ConfigError where peft, an optional extra, cannot be imported."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"adapters need peft, which cannot be imported: {error}",
            where="algorithm.method",
            fix="pip install -e '.[lora]' in the clone, on every host",
        ) from error


def add_adapters(config: Config, model: nn.Module) -> None:
    """Put the adapters of config.lora on `model` if the method trains adapters; else leave it alone.

    The model may be ordinary, on the meta device or partitioned by ZeRO-3. Every A is uniform in +-1/sqrt(in), as in
    LoRA's own code, and drawn whole from run.seed: the same on every client, whatever its number of ranks.
    Raises ConfigError without peft, ModelError for target modules that the model lacks or that cannot have adapters.
    """
    if not METHODS[config.algorithm.method].adapters:
        return
    require_peft()
    import peft

    lora = config.lora
    # of a module without a config peft takes the names as they are; those of some mixtures of experts it would turn
    # into the fused experts, which are no linear layers
    outer = nn.ModuleDict({"model": model})
    targets = [f"model.{name}" for name in _target_names(model, lora.target_modules)]
    wanted = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # it is divided by the rank, whole or not
        lora_dropout=lora.dropout,
        target_modules="|".join(map(re.escape, targets)),  # a string has to match the whole name
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it adapts to GPT-2's transposed layers
        peft.inject_adapter_in_model(wanted, outer, _NAME)
    generator = torch.Generator().manual_seed(config.run.seed)
    for _, layer in _lora_layers(model):
        a, b, base = layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight, layer.get_base_layer().weight
        if base.is_meta:
            continue
        bound = a.shape[1] ** -0.5
        values = torch.empty(a.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
        a.data = values.to(base.device, base.dtype)
        b.data = torch.zeros(b.shape, device=base.device, dtype=base.dtype)


def find_adapters(model: nn.Module) -> tuple[Adapter, ...]:
    """Return the adapters that `add_adapters` has put on the model, in the model's order."""
    found = []
    for name, layer in _lora_layers(model):
        base = layer.get_base_layer()
        tensors = [key for key, _ in [*base.named_parameters(), *base.named_buffers()]]
        found.append(
            Adapter(
                weight=f"{name}.weight",
                a=f"{name}.lora_A.{_NAME}.weight",
                b=f"{name}.lora_B.{_NAME}.weight",
                scale=layer.scaling[_NAME],
                transposed=layer.fan_in_fan_out,
                renamed={f"{name}.{key}": f"{name}.base_layer.{key}" for key in tensors},
            )
        )
    return tuple(found)


def adapter_plan(model: nn.Module) -> BlockPlan:
    """Make the plan with one block of all adapters; everything else is frozen."""
    shapes = parameter_shapes(model)
    names = [name for adapter in find_adapters(model) for name in (adapter.a, adapter.b)]
    assert names, "add_adapters comes first"
    block = Block("adapters", tuple(names), sum(prod(shapes[name]) for name in names))
    return BlockPlan((block,), tuple(name for name in shapes if name not in set(names)))


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def _target_names(model: nn.Module, wanted: Sequence[str]) -> list[str]:
    """Return full names of modules that get adapters. wanted: full names or their ends; empty: all in the layers."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    if not wanted:
        return _inside_layers(model, linear)
    chosen = []
    for target in wanted:
        matching = [name for name in linear if f".{name}".endswith(f".{target}")]
        if not matching:
            known = dict.fromkeys(name.rpartition(".")[2] for name in linear)
            raise ModelError(
                f"{type(model).__name__} has no linear layer {target!r}",
                where="lora.target_modules",
                fix=f"name some of {', '.join(known)}, or leave it empty for all linear layers of the transformer",
            )
        chosen += matching
    _refuse_tied(model, chosen)
    return list(dict.fromkeys(chosen))


def _inside_layers(model: nn.Module, linear: Sequence[str]) -> list[str]:
    try:
        lists = tuple(f"{name}." for name in find_layers(model, parameter_shapes(model)))
    except ValueError as error:
        raise ModelError(str(error), where="model.path", fix="name layers in lora.target_modules") from error
    inside = [name for name in linear if name.startswith(lists)]
    if not inside:
        raise ModelError(
            f"the layers of {type(model).__name__} hold no linear layer that could have an adapter",
            where="lora.target_modules",
            fix=f"name some of {', '.join(linear)}" if linear else "use a model with linear layers",
        )
    return inside


def _refuse_tied(model: nn.Module, names: Sequence[str]) -> None:
    """Raise ModelError for a weight that two modules share: merging the adapter of one would change the other, too."""
    parameters = list(model.named_parameters(remove_duplicate=False))
    for name in names:
        weight = model.get_submodule(name).weight
        others = [other for other, p in parameters if p is weight and other != f"{name}.weight"]
        if others:
            raise ModelError(
                f"{name} shares its weight with {others[0]}, so that an adapter cannot be merged into it",
                where="lora.target_modules",
                fix=f"leave {name} out",
            )

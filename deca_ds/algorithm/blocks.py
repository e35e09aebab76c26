"""Split a model's parameters into disjoint blocks, found from the module structure (no list of model names)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from torch import nn


@dataclass(frozen=True)
class Block:
    """Parameters that are trained together.

    names: parameter names in the model's order. numel: number of elements in all of them. label: for people.
    """

    label: str
    names: tuple[str, ...]
    numel: int


@dataclass(frozen=True)
class BlockPlan:
    """The blocks of a model and the parameters that none of them trains."""

    blocks: tuple[Block, ...]
    frozen: tuple[str, ...]


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Full shape of every parameter under its first name, also where ZeRO-3 has left only a shard of it."""
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}


def find_layers(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Name of the model's list of layers: the `ModuleList` of same-class modules that holds the most elements.

    Of two lists that hold the same the outer one wins. Raises ValueError where the model has no such list.
    """
    best, best_numel = None, 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len({type(child) for child in module}) != 1:
            continue
        numel = sum(prod(shape) for parameter, shape in shapes.items() if parameter.startswith(name + "."))
        if numel > best_numel:  # strictly: named_modules lists a parent before its children
            best, best_numel = name, numel
    if best is None:
        raise ValueError(f"{type(model).__name__} has no list of same-class layers, so it cannot be split into blocks")
    return best


def split_into_blocks(model: nn.Module, *, layers_per_block: int | None, outside: str) -> BlockPlan:
    """Split `model` into blocks of consecutive layers, plus what lies outside the layers.

    layers_per_block: layers in a block; the last block takes what is left over. None: all layers make one block, and
    what lies outside is part of it or frozen.
    outside: what becomes of the embeddings before and the norm and head after the layers: "own" makes them the first
    and the last block, "joined" adds them to the first and the last block, "frozen" never trains them. A trailing norm
    with no head of its own (tied embeddings) never makes a block: it joins the last one, so that no inner steps are
    spent on a few thousand numbers.
    A tied parameter is listed once, under its first name. Blocks come in the model's order.
    Raises ValueError for a model without layers and for layers_per_block < 1.
    """
    if layers_per_block is not None and layers_per_block < 1:
        raise ValueError(f"layers_per_block must be at least 1, not {layers_per_block}")
    shapes = parameter_shapes(model)
    prefix = find_layers(model, shapes) + "."
    layers: dict[int, list[str]] = {}
    before: list[str] = []
    after: list[str] = []
    for name in shapes:
        if name.startswith(prefix):
            layers.setdefault(int(name[len(prefix) :].split(".", 1)[0]), []).append(name)
        else:
            (after if layers else before).append(name)

    indices = sorted(layers)
    if layers_per_block is None:
        layers_per_block, outside = len(indices), "joined" if outside == "own" else outside
    groups = [indices[i : i + layers_per_block] for i in range(0, len(indices), layers_per_block)]
    named = [(_layer_label(group), [name for index in group for name in layers[index]]) for group in groups]
    frozen: list[str] = []
    if outside == "frozen":
        frozen = before + after
    elif outside == "joined":
        named[0] = ("embeddings + " + named[0][0], before + named[0][1])
        named[-1] = (named[-1][0] + " + head", named[-1][1] + after)
    elif outside == "own":
        if all(len(shapes[name]) < 2 for name in after):
            named[-1] = (named[-1][0] + " + norm", named[-1][1] + after)
        else:
            named.append(("norm + head", after))
        if before:
            named.insert(0, ("embeddings", before))
    else:
        raise ValueError(f"outside must be own, joined or frozen, not {outside!r}")
    blocks = tuple(Block(label, tuple(names), sum(prod(shapes[name]) for name in names)) for label, names in named)
    return BlockPlan(blocks, tuple(frozen))


def _layer_label(group: list[int]) -> str:
    return f"layer {group[0]}" if len(group) == 1 else f"layers {group[0]}-{group[-1]}"

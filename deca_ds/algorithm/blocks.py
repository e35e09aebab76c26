"""Split a model's parameters into disjoint blocks, found from the module structure (no list of model names)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Protocol, cast

from torch import nn

_SMALLEST_STACK = 0.05  # of what the largest stack holds: smaller ones are parts of what lies outside the layers
_MUCH_LARGER = 5  # times the mean block


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
    """The blocks of a model and the parameters that none of them trains.

    beside: those of `frozen` that serve images, audio or other input than text, so that text cannot train them.
    """

    blocks: tuple[Block, ...]
    frozen: tuple[str, ...]
    beside: tuple[str, ...] = ()

    @property
    def imbalance(self) -> tuple[str, ...]:
        """For people, of each block that is much larger than the others: how large it is and what to do about it.

        Much larger: more than half of all that is trained and 1.5 times the mean block, or more than five times that.
        """
        total = sum(block.numel for block in self.blocks)
        said = []
        for block in self.blocks if len(self.blocks) > 1 else ():
            share, times = block.numel / total, block.numel * len(self.blocks) / total
            if times > (1.5 if share > 0.5 else _MUCH_LARGER):
                said.append(
                    f"block {block.label!r} holds {share:.0%} of the parameters that are trained, {times:.1f} times "
                    "the mean block: it decides the memory, and every block gets as many inner steps; " + _remedy(block)
                )
        return tuple(said)


def _remedy(block: Block) -> str:
    if "layer" not in block.label:
        return "blocks.outside=frozen leaves it as it is, a larger blocks.layers_per_block makes the others larger"
    if " + " in block.label and not block.label.endswith(" + norm"):
        return "blocks.outside=own trains what lies outside the layers apart"
    if block.label.startswith("layers"):
        return "a smaller blocks.layers_per_block divides it"
    return "a larger blocks.layers_per_block makes the others larger"


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the full shape of every parameter under its first name, also where ZeRO-3 has left only a shard of it."""
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}


def fused_parameters(model: nn.Module, beside: Collection[str] = ()) -> list[str]:
    """Return the names of the parameters that hold the matrices of several experts: of three and more dimensions, and
    not those of a module of torch's, such as a convolution. beside: those that other input than text needs are none."""
    return [
        f"{place}.{name}"
        for place, module in model.named_modules()
        if not type(module).__module__.startswith("torch.nn.")
        for name, parameter in module.named_parameters(recurse=False)
        if len(getattr(parameter, "ds_shape", parameter.shape)) > 2 and f"{place}.{name}" not in beside
    ]


def find_layers(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Return where the model's layers are: the name of every list of layers -> the number of its first layer.

    A list is an outermost `ModuleList`, whatever the classes of its modules, of the text model. Lists of one length in
    one module are one stack of layers, of which each has a part in every list. The stacks that hold the parameters
    count, in the model's order: the largest, and those that hold at least a twentieth of it.
    Raises ValueError where the model has no such list.
    """
    lists = _outermost_lists(model)
    held = dict.fromkeys(lists, 0)
    for name, shape in shapes.items():
        for prefix in _ancestors(name):
            if prefix in held:
                held[prefix] += prod(shape)
    stacks: dict[tuple[str, int], list[str]] = {}
    for name, length in lists.items():
        parent = name.rpartition(".")[0]
        if held[name]:
            in_list = isinstance(model.get_submodule(parent), nn.ModuleList)
            stacks.setdefault((name if in_list else parent, length), []).append(name)
    sizes = {stack: sum(held[name] for name in names) for stack, names in stacks.items()}
    if not sizes:
        raise ValueError(f"{type(model).__name__} has no list of layers, so it cannot be split into blocks")
    found: dict[str, int] = {}
    first = 0
    for stack, names in stacks.items():
        if sizes[stack] >= _SMALLEST_STACK * max(sizes.values()):
            found |= dict.fromkeys(names, first)
            first += stack[1]
    return found


def split_into_blocks(model: nn.Module, *, layers_per_block: int | None, outside: str) -> BlockPlan:
    """Split `model` into blocks of consecutive layers, plus what lies outside the layers.

    layers_per_block: layers in a block; the last block takes what is left over. None: all layers make one block, and
    what lies outside is part of it or frozen.
    outside: what becomes of the embeddings, with all else before the layers, and of the norm and head after them: "own"
    makes them the first and the last block, "joined" adds them to the first and the last block, "frozen" never trains
    them. A trailing norm with no head of its own (tied embeddings) never makes a block: it joins the last one, so that
    no inner steps are spent on a few thousand numbers.
    A parameter that several modules share is listed once, under its first name. What serves other input than text is
    frozen. Blocks come in the model's order.
    Raises ValueError for a model without layers and for layers_per_block < 1.
    """
    if layers_per_block is not None and layers_per_block < 1:
        raise ValueError(f"layers_per_block must be at least 1, not {layers_per_block}")
    shapes = parameter_shapes(model)
    lists = find_layers(model, shapes)
    beside = _beside_text(model, shapes, next(iter(lists)))
    embeddings = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    layers, before, after = _by_layer([name for name in shapes if name not in beside], lists, embeddings)
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
    return BlockPlan(blocks, (*frozen, *beside), beside)


def _by_layer(
    names: Iterable[str], lists: Mapping[str, int], embeddings: Collection[str]
) -> tuple[dict[int, list[str]], list[str], list[str]]:
    """Return the parameters' names by the number of their layer, those before the layers, and those after them.

    names: in the model's order. lists: see `find_layers`. embeddings: parameters that are before, wherever they stand.
    """
    layers: dict[int, list[str]] = {}
    before: list[str] = []
    after: list[str] = []
    for name in names:
        prefix = next((prefix for prefix in _ancestors(name) if prefix in lists), None)
        if prefix is not None:
            layers.setdefault(lists[prefix] + int(name[len(prefix) + 1 :].split(".", 1)[0]), []).append(name)
        else:
            (after if layers and name not in embeddings else before).append(name)
    return layers, before, after


def _layer_label(group: list[int]) -> str:
    return f"layer {group[0]}" if len(group) == 1 else f"layers {group[0]}-{group[-1]}"


def _ancestors(name: str) -> list[str]:
    """Return the names of the modules that contain the module `name`, outermost first."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


def _outermost_lists(model: nn.Module) -> dict[str, int]:
    """Map names of module lists to their lengths, for lists that lie in no other list and in no tower for other input
    than text."""
    found: dict[str, int] = {}
    closed: list[str] = []  # prefixes that nothing is looked for in
    for name, module in model.named_modules():
        if name.startswith(tuple(closed)):
            continue
        if _reads(module) and "text" not in _reads(module):
            closed.append(name + ".")
        elif isinstance(module, nn.ModuleList) and not all(isinstance(child, nn.ModuleList) for child in module):
            found[name] = len(module)
            closed.append(name + ".")
    return found


class _WithHead(Protocol):
    """A transformers model with a head, whose body reads more than text."""

    def get_output_embeddings(self) -> nn.Module | None: ...


def _beside_text(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], layers: str) -> tuple[str, ...]:
    """Return the parameters that serve other input than text, where the modules say what they read, as models of
    transformers do.

    These are towers that do not read text and, in a model that reads more, what lies outside the text model and is not
    the head. layers: name of a list of the text model's layers.
    """
    towers = tuple(f"{name}." for name, m in model.named_modules() if name and _reads(m) and "text" not in _reads(m))
    text = [name for name in _ancestors(layers) if _reads(model.get_submodule(name)) == {"text"}]
    inside = f"{text[-1]}." if text and _reads(model) > {"text"} else ""
    head = cast(_WithHead, model).get_output_embeddings() if inside else None
    kept = set() if head is None else {id(p) for p in head.parameters()}
    return tuple(
        name
        for name in shapes
        if name.startswith(towers) or not (name.startswith(inside) or id(model.get_parameter(name)) in kept)
    )


def _reads(module: nn.Module) -> set[str]:
    """Return the kinds of input that a module says it reads; empty if it does not say."""
    modalities = getattr(module, "input_modalities", ())
    return {modalities} if isinstance(modalities, str) else set(modalities)

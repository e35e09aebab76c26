"""What the weight files hold, compared with what the model needs and, once it is loaded, with what it has.

transformers' loader for ZeRO-3 drops what it has no place for, and ties parameters without looking at their values. So
the names and shapes are matched here before anything is loaded, by transformers' own renamings and conversions, and the
values afterwards: each rank compares its slices with the memory-mapped files. No rank holds more than the weights that
are converted together.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.modeling_utils import load_state_dict

from deca_ds.errors import ModelError
from deca_ds.plural import first_few

_some = partial(first_few, most=4)  # names in a message
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# first and last-plus-one element of a row-major parameter that a rank holds, and their values, 1-D
HeldElements = tuple[int, int, Tensor]


@dataclass
class _Group:
    """Weights that make one or more tensors of the model: as they are (no converter), or converted together."""

    sources: list[tuple[str, str]] = field(default_factory=list)  # (name in the files, pattern of the converter)
    converter: WeightConverter | None = None


class GivenWeights:
    """The weights in a model's files, and which tensors of the model each of them makes.

    model: on the meta device, its tied weights tied. files: as `from_pretrained` chooses them. path: for messages.
    untied: pairs of names that the configuration ties although the files give them different values. notes: what a user
    should know, a line each. Raises ModelError unless every parameter and buffer of the model comes from a weight of
    its shape, and every weight has its place in the model or is one that the model's class is known to leave out.
    """

    def __init__(self, model: PreTrainedModel, files: Sequence[str], path: str):
        self._model, self._files, self._path = model, files, path
        self._held = dict(model.state_dict(keep_vars=True))
        self.notes: list[str] = []
        stored = self._read("meta")
        self._groups, left_out = self._assign(stored)
        made = self._make_empty(stored)
        missing = self._missing(made)
        self._refuse_left_out({name: stored[name].shape for name in left_out}, missing)
        self._refuse_missing(missing)
        self.untied = self._disagreeing(made)
        self._note_rounded()

    def compare(self, model: nn.Module, own: Callable[[nn.Parameter], HeldElements]) -> None:
        """Raise ModelError unless the loaded `model` has the files' values in its data type, and all are finite.

        own: what this rank has of a parameter. Persistent buffers, which every rank has whole, are set to the files'
        values in the precision that plain transformers keeps them in.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        stored = self._read("cpu")
        differ, infinite = [], []
        with torch.no_grad():
            for target, group in self._groups.items():
                for name, value in self._convert(target, group, stored).items():
                    if name not in parameters:
                        buffer = model.get_buffer(name)
                        buffer.data = value.to(buffer.device, self._precision(name), copy=True)
                        finite = bool(torch.isfinite(buffer).all())
                    else:
                        start, stop, held = own(parameters[name])
                        wanted = value.reshape(-1)[start:stop].to(held.dtype)
                        finite = bool(torch.isfinite(wanted).all())
                        if finite and not torch.equal(held.cpu(), wanted):
                            differ.append(name)
                    if not finite:
                        infinite += [n for n, _ in group.sources if not torch.isfinite(stored[n]).all()] or [name]
        if infinite:
            raise self._error(
                f"NaN or infinite values in {_some(dict.fromkeys(infinite))}",
                "these weights are damaged, or diverged when they were trained: give others",
            )
        if differ:
            raise self._error(
                f"{_some(differ)}: not what the files hold, once the model is on ZeRO-3 shards",
                "this architecture's weights cannot be loaded partitioned; save the model again with this version of "
                "transformers (from_pretrained, save_pretrained), or use another model",
            )

    def _read(self, device: str) -> dict[str, Tensor]:
        """Read all tensors of the files by name: memory-mapped on the CPU, or without values on the meta device."""
        stored: dict[str, Tensor] = {}
        for file in self._files:
            try:
                tensors = load_state_dict(file, map_location=device)
            except (OSError, ValueError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
                what = f"cannot read {file}: {str(error) or 'it is empty'}"
                raise ModelError(what, where="model.path", fix="replace this file") from error
            if not isinstance(tensors, Mapping):
                raise self._error(f"{file} holds a {type(tensors).__name__}", "give the model's weights alone")
            if twice := sorted(stored.keys() & tensors.keys()):
                raise self._error(f"{_some(twice)}: in {file} and in another file", "keep one of the two")
            if strange := [name for name, value in tensors.items() if not isinstance(value, Tensor)]:
                raise self._error(f"{file} holds no tensor under {_some(strange)}", "give the model's weights alone")
            stored |= tensors
        return stored

    def _assign(self, stored: Iterable[str]) -> tuple[dict[str, _Group], list[str]]:
        """Return the names in the files, grouped by the first tensor that they make, and those without a place in the
        model."""
        mapping = get_model_conversion_mapping(self._model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        prefix = self._model.base_model_prefix
        groups: dict[str, _Group] = {}
        left_out, twice = [], []
        for name in sorted(stored, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, self._held)
            if target not in self._held and name in self._held:
                target, pattern = rename_source_key(name, [], [], prefix, self._held)
            if target not in self._held:
                left_out.append(name)
                continue
            converter = None if pattern is None else by_pattern.get(pattern)
            group = groups.setdefault(target, _Group(converter=converter))
            if group.sources and (group.converter is None or pattern is None):
                twice.append(f"{group.sources[0][0]} and {name}")
            group.sources.append((name, pattern or name))
        if twice:
            raise self._error(f"{_some(twice)} are the same parameter", "keep one of the two in the files")
        return groups, left_out

    def _convert(self, target: str, group: _Group, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of the model that a group makes, by name."""
        if group.converter is None:
            return {target: stored[group.sources[0][0]]}
        converter = deepcopy(group.converter)
        for name, pattern in group.sources:
            converter.add_tensor(target, name, pattern, stored[name])  # type: ignore[arg-type]  # takes tensors, too
        try:
            made = converter.convert(target, model=self._model, config=self._model.config)
        except (RuntimeError, ValueError, KeyError, IndexError, TypeError) as error:
            names = _some(name for name, _ in group.sources)
            raise self._error(f"{names} do not make {target}: {error}", "give complete weights") from error
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def _make_empty(self, stored: Mapping[str, Tensor]) -> set[str]:
        """Return the names of all tensors that the files make; refuse other shapes and data types."""
        shapes, types, made = [], [], set()
        for target, group in self._groups.items():
            for name, value in self._convert(target, group, stored).items():
                made.add(name)
                needed = self._held.get(name)
                if needed is None or value.shape != needed.shape:
                    wanted = "no such tensor" if needed is None else f"{tuple(needed.shape)}"
                    shapes.append(f"{name} {tuple(value.shape)} in the files, {wanted} in the model")
            if self._held[target].is_floating_point():
                types += [f"{n} ({stored[n].dtype})" for n, _ in group.sources if stored[n].dtype not in _FLOATS]
        if types:
            raise self._error(f"quantised weights: {_some(types)}", "give the weights in float32, bfloat16 or float16")
        if shapes:
            raise self._error(
                f"mismatched shapes: {_some(shapes, between='; ')}",
                "give the config.json that belongs to these weights",
            )
        return made

    def _refuse_left_out(self, shapes: Mapping[str, torch.Size], missing: Sequence[str]) -> None:
        """Refuse weights that have no place in the model, but for those that its class leaves out by its own rules, and
        masks of attention, which older versions saved. missing: what the model lacks, which may be what was renamed."""
        rules = list(self._model._keys_to_ignore_on_load_unexpected or ())
        # buffers that older versions saved, and that are computed
        rules += [rf"{end}$" for end in (r"rotary_emb\.inv_freq", r"(^|\.)position_ids") if self._computes(end)]
        known = [
            name for name in shapes if any(re.search(rule, name) for rule in rules) or _is_mask(name, shapes[name])
        ]
        if unknown := sorted(set(shapes) - set(known)):
            what = f"{len(unknown)} weights have no place in {type(self._model).__name__}: {_some(unknown)}"
            wrapper = unknown[0].partition(".")[0] + "."
            if all(name.startswith(wrapper) and name.removeprefix(wrapper) in self._held for name in unknown):
                raise self._error(
                    what, f"remove {wrapper!r}, which is from a wrapper of the model, from their names in the files"
                )
            raise self._error(
                what + (f"; and the model lacks {_some(missing)}" if missing else ""),
                "give the config.json that belongs to them (its number of layers, tie_word_embeddings, architecture), "
                + ("rename them if they are what the model lacks, " if missing else "")
                + "or take them out of the files",
            )
        if known:
            self.notes.append(
                f"{len(known)} weights in the files are left out, as {type(self._model).__name__} does not use them: "
                f"{_some(known)}; an export will not have them"
            )

    def _computes(self, pattern: str) -> bool:
        return any(re.search(rf"{pattern}$", name) for name, _ in self._model.named_non_persistent_buffers())

    def _missing(self, made: set[str]) -> list[str]:
        """Return the parameters and buffers that the files lack."""
        given = {id(self._held[name]) for name in made}
        missing = [name for name, held in self._held.items() if id(held) not in given]
        rules = self._model._keys_to_ignore_on_load_missing or ()
        return [
            name
            for name in missing
            if isinstance(self._held[name], nn.Parameter) or not any(re.search(rule, name) for rule in rules)
        ]

    def _refuse_missing(self, missing: Sequence[str]) -> None:
        """Refuse what the files lack: it would be random."""
        if missing:
            fix = "give a complete model folder, or model.init=random to train from random weights"
            if missing == [self._output_name()]:
                fix = "set tie_word_embeddings: true in config.json if the head is the embedding; else " + fix
            raise self._error(f"{len(missing)} missing keys: {_some(missing)}", fix)

    def _output_name(self) -> str | None:
        output = self._model.get_output_embeddings()
        return next((f"{n}.weight" for n, m in self._model.named_modules() if m is output), None)

    def _disagreeing(self, made: set[str]) -> list[tuple[str, str]]:
        """Return pairs of tied names to which the files give different values."""
        shared: dict[int, list[str]] = {}
        for name in self._held:
            if name in made:
                shared.setdefault(id(self._held[name]), []).append(name)
        tied = [names for names in shared.values() if len(names) > 1]
        stored = self._read("cpu") if tied else {}
        value: dict[str, Tensor] = {}
        for target, group in self._groups.items() if tied else ():
            if any(target in names for names in tied):
                value |= self._convert(target, group, stored)
        return [
            (names[0], other) for names in tied for other in names[1:] if not torch.equal(value[names[0]], value[other])
        ]

    def _precision(self, name: str) -> torch.dtype:
        """Return the data type in which plain transformers keeps a tensor."""
        dtype: torch.dtype = self._held[name].dtype
        if dtype.is_floating_point:
            plan: dict[str, torch.dtype] = self._model._get_dtype_plan(dtype)
            for pattern, kept in plan.items():
                if re.search(pattern.replace("*", r".*"), name):
                    return kept
        return dtype

    def _note_rounded(self) -> None:
        trained_in = self._model.config.dtype
        parameters = [name for name, held in self._held.items() if isinstance(held, nn.Parameter)]
        if rounded := [name for name in parameters if self._precision(name) != trained_in]:
            self.notes.append(
                f"transformers keeps {_some(rounded)} in float32; here they are rounded to model.dtype, but for the "
                "time that their block is trained"
            )

    def _error(self, what: str, fix: str) -> ModelError:
        return ModelError(f"the weights of {self._path!r}: {what}", where="model.path", fix=fix)


def _is_mask(name: str, shape: torch.Size) -> bool:
    """Return whether this is a constant of attention that GPT-2, GPT-Neo, GPT-J and their like saved: which tokens see
    which, [1, 1, positions, positions], or the score of those that are not seen. A parameter has another shape."""
    if name.endswith(".masked_bias"):
        return shape.numel() == 1
    square = len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
    return square and name.endswith((".bias", ".causal_mask"))

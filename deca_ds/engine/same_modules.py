"""Whether a model runs the same modules, in the same order, for all data.

ZeRO-3 gathers a module's parameters when it runs. Ranks whose data choose other modules would gather different ones:
they would mix them up, or wait for each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deca_ds.engine import internals
from deca_ds.errors import ModelError
from deca_ds.plural import first_few


@torch.no_grad()
def check_same_modules(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], device: torch.device) -> None:
    """Raise ModelError if one of `batches` runs other modules than the first. Inside a module that ZeRO-3 gathers as a
    whole they may be others. All ranks of a client call this with the same batches."""
    called: list[str] = []
    gathered = _gathered(model)
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name)) for name, module in gathered.items()
    ]
    first: list[str] | None = None
    try:
        for batch in batches:
            called.clear()
            ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
            model(input_ids=ids, attention_mask=mask, use_cache=False)
            if first is None:
                first = list(called)
            elif called != first:
                some = sorted(set(first) ^ set(called)) or [_first_difference(first, called)]
                raise ModelError(
                    f"{type(model).__name__} runs {first_few(some, 3)} for some data only, or more often or earlier: "
                    "the ranks of a client, whose data differ, would mix up their parts of the parameters",
                    where="model.path",
                    fix="give each client one rank, keep what a layer chooses from in a list of modules in that layer, "
                    "or use another model",
                )
    finally:
        for hook in hooks:
            hook.remove()


def _first_difference(some: Sequence[str], others: Sequence[str]) -> str:
    """Return what one of two series has where they part; one may be the beginning of the other."""
    pairs = zip_longest(some, others)
    return next(one or other or "" for one, other in pairs if one != other)


def _gathered(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules whose parameters are gathered when they run, without those inside others."""
    found: dict[str, nn.Module] = {}
    whole = tuple(f"{name}." for name, module in model.named_modules() if internals.is_leaf(module))
    for name, module in model.named_modules():
        own = next(module.parameters(recurse=False), None) is not None
        if (own or internals.is_leaf(module)) and not name.startswith(whole):
            found[name] = module
    return found

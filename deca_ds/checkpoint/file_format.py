"""What a model's checkpoint must hold, and under which names Hugging Face stores it.

A module's parameter names are not always those of its files: transformers fuses the experts of Mixtral, or renames
GPT-NeoX's head, when it loads, and undoes that when it saves. The export writes what `save_pretrained` would write, so
that other readers of the format can read it too; conversions that need several parameters get them together.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, revert_weight_conversion

from deca_ds.errors import CheckpointError, in_words


def empty_model(folder: Path, *, trust_remote_code: bool) -> PreTrainedModel:
    """Return the causal language model that `folder`/config.json describes, on the meta device, tied weights tied.

    Raises CheckpointError if there is no config.json or no model can be made from it.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError("no config.json", where=str(folder), fix="give the output folder of a run")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with init_empty_weights():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, ImportError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"no model can be made from config.json: {in_words(error)}",
            where=str(folder / "config.json"),
            fix="use the transformers version of the run; for code that comes with the model, --trust-remote-code",
        ) from error
    model.tie_weights()
    return model


def stored_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Return the full shape of every parameter (a shared one under its first name) and persistent buffer, in the
    model's order."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return shapes | {name: tuple(t.shape) for name, t in model.state_dict().items() if name not in parameters}


def conversion_groups(model: PreTrainedModel, names: Iterable[str]) -> list[list[str]]:
    """Return `names` in order, joined to groups where the file format makes something out of several of them."""
    mapping = get_model_conversion_mapping(model, add_legacy=False)
    converters = [entry.reverse_transform() for entry in reversed(mapping) if isinstance(entry, WeightConverter)]
    groups: dict[str, list[str]] = {}
    for name in names:
        renamed = (converter.rename_source_key(name) for converter in converters)
        key = next((key for key, pattern in renamed if pattern is not None), name)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def to_file_format(model: PreTrainedModel, group: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the parameters of one conversion group, by module name, to tensors by the name that they have in a
    file."""
    named: dict[str, Tensor] = revert_weight_conversion(model, group)
    return named

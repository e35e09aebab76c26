"""What is known of a model before its weights are loaded: its configuration, modules, shapes and blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from deca_ds.algorithm import METHODS, BlockPlan, split_into_blocks
from deca_ds.config import Config
from deca_ds.config.paths import check_model_path
from deca_ds.config.schema import ModelConfig
from deca_ds.engine.adapters import adapter_plan
from deca_ds.engine.explain import BAD_FILE, explained
from deca_ds.errors import ModelError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_architecture(model: ModelConfig) -> PretrainedConfig:
    """Load the model's configuration. Raises ModelError if it cannot be had."""
    check_model_path(model)
    with explained(model.path, "model.path", BAD_FILE):
        architecture: PretrainedConfig = AutoConfig.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    for part in (architecture, architecture.get_text_config()):  # outputs that nobody reads, and the form that is read
        for name, wanted in (("output_attentions", False), ("output_hidden_states", False), ("return_dict", True)):
            if getattr(part, name, wanted) != wanted:
                setattr(part, name, wanted)
    return architecture


def meta_model(model: ModelConfig, architecture: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """Build the model's modules on the meta device: shapes without memory or values. options: of transformers."""
    from accelerate import init_empty_weights

    with init_empty_weights(), no_init_weights(), explained(model.path, "model.path", BAD_FILE):
        built: PreTrainedModel = AutoModelForCausalLM.from_config(
            architecture, dtype=DTYPES[model.dtype], trust_remote_code=model.trust_remote_code, **options
        )
    built.tie_weights()
    return built


def expert_lists(model: nn.Module) -> list[nn.Module]:
    """Return the modules inside the model's layers that hold a list of modules, of which they may use others for other
    data.

    That is what experts in a list are; a list that is always used whole costs memory here and nothing else.
    """
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList | nn.ModuleDict)]
    inner = [name for name in lists if any(name.startswith(f"{other}.") for other in lists)]
    owners = [name.rpartition(".")[0] for name in inner]
    # a list in a list, as layers of layers are, is no single module's choice
    return [model.get_submodule(name) for name in dict.fromkeys(owners) if name not in lists]


def find_blocks(config: Config, model: nn.Module) -> BlockPlan:
    """Split the model into blocks as the configuration wants them. Raises ModelError for a model without a list of
    layers."""
    if METHODS[config.algorithm.method].adapters:
        return adapter_plan(model)
    try:
        return split_into_blocks(model, layers_per_block=config.blocks.layers_per_block, outside=config.blocks.outside)
    except ValueError as error:
        raise ModelError(str(error), where="model.path", fix="use a model with a list of layers") from error

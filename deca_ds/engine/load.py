"""Build a Hugging Face causal LM straight into ZeRO-3 shards: no rank ever holds the whole model.

What is loaded is compared with the weight files, see compare_weights.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from deca_ds.config import Config
from deca_ds.config.deepspeed import read_deepspeed_json
from deca_ds.engine import internals
from deca_ds.engine.adapters import add_adapters
from deca_ds.engine.architecture import DTYPES, expert_lists
from deca_ds.engine.compare_weights import HeldElements
from deca_ds.engine.explain import explained
from deca_ds.engine.heap import return_freed_memory
from deca_ds.engine.random_weights import draw_weights, nothing_drawn
from deca_ds.engine.weight_files import given_weights
from deca_ds.errors import ModelError


def zero3_config(config: Config) -> dict[str, Any]:
    """Make the DeepSpeed configuration of a client: what the user's JSON says, plus what block-wise training needs."""
    merged = read_deepspeed_json(Path(config.deepspeed)) if config.deepspeed else {}
    merged["train_micro_batch_size_per_gpu"] = config.data.micro_batch_size
    merged["bf16"] = {"enabled": config.model.dtype == "bfloat16"}
    merged["zero_optimization"] = {
        **merged.get("zero_optimization", {}),
        "stage": 3,
        # a parameter that stays gathered would not see what is written to its shards
        "stage3_param_persistence_threshold": 0,
        "stage3_model_persistence_threshold": 0,
    }
    return merged


def load_model(config: Config, architecture: PretrainedConfig) -> PreTrainedModel:
    """Load the model, partitioned over this client's ranks while it is built. All of the client's ranks must call this.

    If the method trains adapters, they are on it. model.init=random draws the weights from run.seed.
    Raises ModelError for weights that do not fit the architecture, are not finite, or do not arrive on the shards.
    """
    from transformers.integrations import HfDeepSpeedConfig

    given = given_weights(config.model, architecture) if config.model.init == "pretrained" else None
    internals.start()
    # transformers builds and loads under zero.Init while this object lives
    zero_init = HfDeepSpeedConfig(zero3_config(config))
    options: dict[str, Any] = {"dtype": DTYPES[config.model.dtype], "trust_remote_code": config.model.trust_remote_code}
    if config.model.attention:
        options["attn_implementation"] = config.model.attention
    torch.manual_seed(config.run.seed)
    model: PreTrainedModel
    with explained(config.model.path, "model.path"), _partitionable(architecture):
        if given is None:
            with nothing_drawn():
                model = AutoModelForCausalLM.from_config(architecture, **options)
            draw_weights(model, config.run.seed)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                config.model.path, config=architecture, revision=config.model.revision, **options
            )
    del zero_init
    if given is not None:
        given.compare(model, _held_elements)
    internals.keep_whole(expert_lists(model))
    add_adapters(config, model)
    return_freed_memory()
    if config.model.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        # transformers makes the embeddings' output need a gradient, which would drive every backward pass through the
        # layers below the active block
        model.disable_input_require_grads()
    return model


def _held_elements(parameter: nn.Parameter) -> HeldElements:
    return *internals.shard_range(parameter), internals.shard(parameter)


@contextmanager
def _partitionable(architecture: PretrainedConfig) -> Iterator[None]:
    """Explain what modelling code raises that looks at the shape of a parameter while ZeRO-3 has it partitioned."""
    try:
        yield
    except IndexError as error:
        raise ModelError(
            f"a model of type {architecture.model_type} cannot be built on ZeRO-3 shards: {error}",
            where="model.path",
            fix="use another architecture",
        ) from error

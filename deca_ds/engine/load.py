"""Build a Hugging Face causal LM straight into ZeRO-3 shards: no rank ever holds the whole model."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from deca_ds.algorithm.blocks import BlockPlan, split_into_blocks
from deca_ds.algorithm.methods import METHODS
from deca_ds.config.checks import read_deepspeed_json
from deca_ds.config.paths import check_model
from deca_ds.config.schema import Config, ModelConfig
from deca_ds.engine import internals
from deca_ds.engine.adapters import adapter_plan, add_adapters
from deca_ds.engine.random_weights import draw_weights, nothing_drawn
from deca_ds.errors import ModelError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def zero3_config(config: Config) -> dict[str, Any]:
    """The DeepSpeed configuration of a client: what the user's JSON says, plus what block-wise training needs."""
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


def load_architecture(model: ModelConfig) -> PretrainedConfig:
    """The model's configuration. Raises ModelError if it cannot be had."""
    check_model(model)
    with _explained(model.path, "model.path"):
        return AutoConfig.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the model or, if set, of model.tokenizer. Raises ModelError if it cannot be had."""
    path = model.tokenizer or model.path
    check_model(model)
    with _explained(path, "model.tokenizer" if model.tokenizer else "model.path"):
        return AutoTokenizer.from_pretrained(
            path,
            revision=None if model.tokenizer else model.revision,
            trust_remote_code=model.trust_remote_code,
        )


def meta_model(model: ModelConfig, architecture: PretrainedConfig) -> nn.Module:
    """The model's modules on the meta device: shapes without memory."""
    from accelerate import init_empty_weights

    with init_empty_weights(), _explained(model.path, "model.path"):
        built = AutoModelForCausalLM.from_config(architecture, trust_remote_code=model.trust_remote_code)
    built.tie_weights()
    return built


def load_model(config: Config, architecture: PretrainedConfig) -> nn.Module:
    """The model, partitioned over this client's ranks while it is built. All of the client's ranks must call this.

    If the method trains adapters, they are on it. model.init=random draws the weights from run.seed.
    """
    from transformers.integrations import HfDeepSpeedConfig

    internals.start()
    # transformers builds and loads under zero.Init while this object lives
    zero_init = HfDeepSpeedConfig(zero3_config(config))
    options: dict[str, Any] = {"dtype": DTYPES[config.model.dtype], "trust_remote_code": config.model.trust_remote_code}
    if config.model.attention:
        options["attn_implementation"] = config.model.attention
    torch.manual_seed(config.run.seed)
    with _explained(config.model.path, "model.path"):
        if config.model.init == "random":
            with nothing_drawn():
                model = AutoModelForCausalLM.from_config(architecture, **options)
            draw_weights(model, config.run.seed)
        else:
            model, loading = AutoModelForCausalLM.from_pretrained(
                config.model.path,
                config=architecture,
                revision=config.model.revision,
                output_loading_info=True,
                **options,
            )
            _refuse_incomplete(config.model.path, loading)
    del zero_init
    add_adapters(config, model)
    _return_freed_memory()
    if config.model.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        # transformers makes the embeddings' output need a gradient, which would drive every backward pass through the
        # layers below the active block
        model.disable_input_require_grads()
    return model


def _refuse_incomplete(path: str, loading: dict[str, Any]) -> None:
    """Raise ModelError for parameters that the weight files lack or hold in another shape: they would be random."""
    for kind in ("missing_keys", "mismatched_keys"):
        names = sorted(str(key) for key in loading.get(kind) or ())
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ModelError(
                f"the weights of {path!r} do not fit its config.json; {kind.replace('_', ' ')}: {shown}",
                where="model.path",
                fix="give a complete model folder, or model.init=random to train from random weights",
            )


def _return_freed_memory() -> None:
    """Give the host back what building freed: glibc would keep up to a whole model in its heap."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def find_blocks(config: Config, model: nn.Module) -> BlockPlan:
    """The model's blocks as the configuration wants them. Raises ModelError for a model without a list of layers."""
    if METHODS[config.algorithm.method].adapters:
        return adapter_plan(model)
    try:
        return split_into_blocks(model, layers_per_block=config.blocks.layers_per_block, outside=config.blocks.outside)
    except ValueError as error:
        raise ModelError(str(error), where="model.path", fix="use a model with a list of layers") from error


@contextmanager
def _explained(path: str, key: str) -> Iterator[None]:
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:
        here = "" if Path(path).is_dir() else f", which is no folder in {Path.cwd()} and so a name of the hub"
        raise ModelError(
            f"cannot load {path!r}{here}: {error}",
            where=key,
            fix="give a folder with config.json, weights and tokenizer, or a hub name that this host can reach",
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)

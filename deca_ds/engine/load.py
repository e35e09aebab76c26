"""Build a Hugging Face causal LM straight into ZeRO-3 shards: no rank ever holds the whole model.

What is loaded is compared with the weight files, see compare_weights.py.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.modeling_utils import _get_resolved_checkpoint_files
from transformers.utils import find_adapter_config_file
from transformers.utils import logging as transformers_logging

from deca_ds.algorithm import METHODS, BlockPlan, split_into_blocks
from deca_ds.config import Config
from deca_ds.config.deepspeed import read_deepspeed_json
from deca_ds.config.hub import cached_files, hub_fix, why_not_whole
from deca_ds.config.paths import check_model_path, look_for
from deca_ds.config.schema import ModelConfig
from deca_ds.engine import internals
from deca_ds.engine.adapters import adapter_plan, add_adapters
from deca_ds.engine.compare_weights import GivenWeights, HeldElements
from deca_ds.engine.heap import return_freed_memory
from deca_ds.engine.random_weights import draw_weights, nothing_drawn
from deca_ds.errors import ModelError

# what transformers raises of a folder, and of what stands in its files
_BAD_FOLDER = (OSError, ValueError, KeyError, ImportError)
BAD_FILE = (
    *_BAD_FOLDER, StrictDataclassError, TypeError, AttributeError, ArithmeticError, AssertionError, RuntimeError,
    SyntaxError,
)  # fmt: skip

# with these transformers' tokenizers begin or end the names of their vocabularies
_VOCABULARY = re.compile(r"^tokenizer\.|^vocab|^merges|spiece|sentencepiece|tekken|\.(model|tiktoken|vocab|bpe)$")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the model or, if set, of model.tokenizer. Raises ModelError if it cannot be had."""
    path, key = model.tokenizer or model.path, "model.tokenizer" if model.tokenizer else "model.path"
    check_model_path(model)
    return tokenizer_in(
        path, key, revision=None if model.tokenizer else model.revision, trust_remote_code=model.trust_remote_code
    )


def tokenizer_in(path: str, key: str, **options: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer in `path`, a folder or a name of the hub. key: where that was given. options: of transformers.
    Raises ModelError if it cannot be had, or lacks its end-of-text token because it lacks the file that names it."""
    with explained(path, key, BAD_FILE, partial(_no_vocabulary, path)):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, **options)
    if tokenizer.eos_token_id is None and not has_tokenizer_settings(path):
        _refuse_without_settings(path, key, tokenizer)
    return tokenizer


def _refuse_without_settings(path: str, key: str, tokenizer: PreTrainedTokenizerBase) -> NoReturn:
    what = "end-of-text token" + (" and no chat template" if not tokenizer.chat_template else "")
    told = (
        f"the tokenizer of {path!r} has no {what}: it comes without tokenizer_config.json, which names special tokens"
    )
    fix = "copy the file from where the model is from; {} in it stands for a tokenizer without special tokens"
    if not os.path.isdir(path) and (why := why_not_whole("model")):
        told, fix = f"{told}; {why}", hub_fix(path, "model")
    raise ModelError(told, where=key, fix=fix)


def has_tokenizer_settings(path: str) -> bool:
    """Return whether a folder, or what the cache has of a name of the hub, has the file that names the special
    tokens."""
    return "tokenizer_config.json" in _files_of(path)


def _no_vocabulary(path: str) -> str | None:
    """Return what a tokenizer lacks if it has no vocabulary."""
    if any(_VOCABULARY.search(file) for file in _files_of(path)):
        return None
    return "there is no tokenizer.json, tokenizer.model or other vocabulary of a tokenizer"


def _files_of(path: str) -> Collection[str]:
    return os.listdir(path) if os.path.isdir(path) else cached_files(path)


def padding_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that fills up rows: any, where there is none for it, as nothing is trained or seen there."""
    pad: int | None = tokenizer.pad_token_id
    return pad if pad is not None else tokenizer.eos_token_id or 0


def meta_model(model: ModelConfig, architecture: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """Build the model's modules on the meta device: shapes without memory or values. options: of transformers."""
    from accelerate import init_empty_weights

    with init_empty_weights(), no_init_weights(), explained(model.path, "model.path", BAD_FILE):
        built: PreTrainedModel = AutoModelForCausalLM.from_config(
            architecture, dtype=DTYPES[model.dtype], trust_remote_code=model.trust_remote_code, **options
        )
    built.tie_weights()
    return built


def given_weights(model: ModelConfig, architecture: PretrainedConfig) -> GivenWeights:
    """Describe the weights in the model's files, matched with the architecture by name and shape; no values are kept.

    Where the architecture ties parameters that have different values in the files, it is changed: they are not tied.
    Raises ModelError for weights that do not fit, see GivenWeights.
    """
    built = meta_model(model, architecture)
    files = _weight_files(model, architecture, is_remote_code=built.is_remote_code())
    given = GivenWeights(built, files, model.path)
    beside = _files_beside(model.path, files)
    if not given.untied:
        given.notes += beside
        return given
    pairs = ", ".join(f"{first} and {second}" for first, second in given.untied)
    for part in (architecture, architecture.get_text_config()):
        part.tie_word_embeddings = False
    given = GivenWeights(meta_model(model, architecture), files, model.path)
    if given.untied:
        raise ModelError(
            f"config.json ties {pairs}, and the files hold different values for them",
            where="model.path",
            fix="give the config.json that belongs to these weights",
        )
    given.notes.append(
        f"config.json ties {pairs}, but the files hold different values for them: they are trained, and exported, as "
        "two parameters (tie_word_embeddings: false)"
    )
    given.notes += beside
    return given


def _weight_files(model: ModelConfig, architecture: PretrainedConfig, *, is_remote_code: bool) -> list[str]:
    """Return the paths of the model's weight files. Raises ModelError where there are none, or those of an adapter."""
    with explained(model.path, "model.path", BAD_FILE):
        if find_adapter_config_file(model.path, revision=model.revision) is not None:
            raise ModelError(
                f"{model.path!r} holds an adapter (adapter_config.json), not a whole model",
                where="model.path",
                fix="merge the adapter into its base model, save that, and give its folder",
            )
        files: list[str] | None
        files, _ = _get_resolved_checkpoint_files(
            model.path,
            variant=None,
            gguf_file=None,
            use_safetensors=None,
            user_agent=None,
            is_remote_code=is_remote_code,
            transformers_explicit_filename=getattr(architecture, "transformers_weights", None),
            download_kwargs={"revision": model.revision},
        )
    assert files is not None, "there are none for no path only"
    return files


def _files_beside(path: str, files: Sequence[str]) -> list[str]:
    """Return a line that names the other weight files in the folder `path`, if any: they may hold other weights."""
    read = {Path(file).name for file in files}
    found = {file.name for kind in ("model*.safetensors", "pytorch_model*.bin") for file in Path(path).glob(kind)}
    if not (others := sorted(found - read)):
        return []
    return [f"weights are read from {min(read)}{' and on' * (len(read) > 1)}, not from {', '.join(others)}"]


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


def _held_elements(parameter: nn.Parameter) -> HeldElements:
    return *internals.shard_range(parameter), internals.shard(parameter)


def find_blocks(config: Config, model: nn.Module) -> BlockPlan:
    """Split the model into blocks as the configuration wants them. Raises ModelError for a model without a list of
    layers."""
    if METHODS[config.algorithm.method].adapters:
        return adapter_plan(model)
    try:
        return split_into_blocks(model, layers_per_block=config.blocks.layers_per_block, outside=config.blocks.outside)
    except ValueError as error:
        raise ModelError(str(error), where="model.path", fix="use a model with a list of layers") from error


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


def _damaged_json(folder: Path) -> str | None:
    """Return which of a model's files is no JSON, and from where on, as one that was not copied whole."""
    for file in sorted(folder.glob("*.json")):
        try:
            json.loads(file.read_bytes())
        except json.JSONDecodeError as error:
            return f"{file.name}, line {error.lineno}: not valid JSON: {error.msg}"
        except UnicodeDecodeError:
            return f"{file.name} is no UTF-8 text"
        except (OSError, ValueError, RecursionError):
            continue  # transformers says what is wrong with it
    return None


@contextmanager
def explained(
    path: str,
    key: str,
    kinds: tuple[type[Exception], ...] = _BAD_FOLDER,
    lacks: Callable[[], str | None] = lambda: None,
) -> Iterator[None]:
    """Raise ModelError for what transformers raises of the model or tokenizer `path`. key: where that was given. lacks:
    returns what is missing there, where transformers does not say so."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    except ModelError:
        raise
    except kinds as error:
        here, fix = "", "give a folder with config.json, weights and tokenizer"
        if damaged := _damaged_json(Path(path)):
            fix = "copy the file again from where the model is from"
            raise ModelError(f"cannot load {path!r}: {damaged}", where=key, fix=fix) from error
        if not Path(path).is_dir():
            here = f", which is no folder in {Path.cwd()} and so a name of the hub"
            fix = f"{look_for(path)}; {hub_fix(path, 'model')}"
        missing = lacks()
        why = why_not_whole("model") if here and (missing or isinstance(error, OSError)) else None
        if missing and not why and key.startswith("model."):
            fix += ", or name that of another model in model.tokenizer"
        said = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ModelError(
            f"cannot load {path!r}{here}: {why or missing or said or type(error).__name__}",
            where=key,
            fix=fix,
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)

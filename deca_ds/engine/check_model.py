"""Whether a model, its weights, its tokenizer and the configuration fit together, before anything is loaded."""

from __future__ import annotations

import copy
import re
from typing import cast

import pyarrow.compute as pc
from datasets import Dataset
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from deca_ds.config import Config
from deca_ds.config.schema import ModelConfig
from deca_ds.data.formats import FORMATS
from deca_ds.engine.architecture import meta_model
from deca_ds.engine.tokenizer import has_tokenizer_settings
from deca_ds.engine.weight_files import given_weights
from deca_ds.errors import DataError, ModelError

_POSITIONAL = re.compile(r"pos|wpe")


def check_model(
    config: Config, architecture: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, *, weights: bool = True
) -> list[str]:
    """Return warnings about the model, a line each. Raises ModelError for what cannot be trained, or not as the user
    means it.

    weights: whether to match the names and shapes in the weight files, too, where model.init wants them; without them
    no model is to be loaded on this host, and a package for model.attention that it lacks is a warning.
    """
    _refuse_quantised(architecture)
    _refuse_layerdrop(architecture)
    model = meta_model(config.model, architecture)
    warnings = _check_attention(config.model, architecture, needed=weights)
    warnings += _check_positions(config, model) + _check_vocabulary(model, tokenizer)
    warnings += _check_special_tokens(config, tokenizer)
    if weights and config.model.init == "pretrained":
        warnings += given_weights(config.model, architecture).notes
    return warnings


def check_token_ids(architecture: PretrainedConfig, *data: Dataset | None) -> None:
    """Raise DataError for encoded data with token ids that the model's vocabulary does not have."""
    rows = architecture.get_text_config().vocab_size
    for part in data:
        if part is None or not len(part):
            continue
        highest = pc.max(pc.list_flatten(part.with_format("arrow")["input_ids"][:])).as_py()
        if highest >= rows:
            raise DataError(
                f"the data has the token id {highest}, and the model's vocabulary {rows} tokens",
                where="model.tokenizer, or model.path",
                fix="take the token out of the data, or give a model whose embedding has a row for it",
            )


def _refuse_quantised(architecture: PretrainedConfig) -> None:
    for part in (architecture, architecture.get_text_config()):
        quantisation = getattr(part, "quantization_config", None)
        if quantisation is not None:
            given = quantisation if isinstance(quantisation, dict) else vars(quantisation)
            method = given.get("quant_method", "by no method")
            raise ModelError(
                f"the model is quantised ({getattr(method, 'value', method)}): its parameters cannot be trained",
                where="quantization_config in the model's config.json",
                fix="give the model that was quantised, or a dequantised copy",
            )


def _refuse_layerdrop(architecture: PretrainedConfig) -> None:
    for key in ("layerdrop", "decoder_layerdrop"):
        if getattr(architecture.get_text_config(), key, 0):
            raise ModelError(
                f"{key} = {getattr(architecture.get_text_config(), key)}: every rank would leave out other layers at "
                "random, and ZeRO-3 needs all ranks to run the same ones",
                where="the model's config.json",
                fix=f"set {key} to 0.0 there",
            )


def _check_attention(model: ModelConfig, architecture: PretrainedConfig, *, needed: bool) -> list[str]:
    """Raise ModelError if transformers cannot build the model with model.attention. If only this host lacks what that
    needs, and it is not `needed` here, return a note instead."""
    if not model.attention:
        return []
    try:
        meta_model(model, copy.deepcopy(architecture), attn_implementation=model.attention)
    except ModelError as error:
        reason = error.__cause__
        told = f"model.attention = {model.attention!r}: {' '.join(str(reason).split())}"
        if isinstance(reason, ImportError) and not needed:
            return [f"on this host {told}"]
        fix = "install what it needs on every host" if isinstance(reason, ImportError) else "name another one"
        raise ModelError(told, where="model.attention", fix=f"{fix}, or leave the key out") from reason
    return []


def position_limit(model: PreTrainedModel) -> tuple[int | None, bool]:
    """Return how many positions the model is made for, None if it does not say, and whether it cannot do more.

    It cannot where positions are rows of an embedding or of a table; rotary ones continue, untrained.
    """
    text = model.config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if limit is None:  # MPT makes its biases for so many
        limit = getattr(text, "max_seq_len", None)
        return limit, limit is not None
    if limit < 1:  # XLNet, of any length
        return None, False
    rows = [
        module.num_embeddings - getattr(module, "offset", 0)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and _POSITIONAL.search(name.rpartition(".")[2])
    ]
    rows += [
        buffer.shape[0]
        for name, buffer in model.named_buffers()
        if buffer.dim() == 2 and buffer.is_floating_point() and _POSITIONAL.search(name.rpartition(".")[2])
    ]
    return limit, limit in rows


def _check_positions(config: Config, model: PreTrainedModel) -> list[str]:
    limit, absolute = position_limit(model)
    length = config.data.max_length
    if limit is None or length <= limit:
        return []
    found = f"data.max_length = {length}, and the model has {limit} positions"
    if absolute:
        raise ModelError(found, where="data.max_length", fix=f"set it to at most {limit}")
    return [f"{found}: it has not been trained on longer sequences"]


def _check_special_tokens(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Warn of a tokenizer that has no end of text, and of one whose special tokens nobody has named."""
    path = config.model.tokenizer or config.model.path
    if tokenizer.eos_token_id is None and "conversation" not in FORMATS[config.data.format].features:
        told = (
            "the tokenizer has no end-of-text token (eos_token in its tokenizer_config.json): nothing marks the end of "
        )
        return [f"{told}an example, and the model does not learn to end its answers"]
    if tokenizer.eos_token_id is not None and not has_tokenizer_settings(path):
        template = "" if tokenizer.chat_template else ", and there is no chat template"
        return [
            f"{path!r} has no tokenizer_config.json: the special tokens are those that {type(tokenizer).__name__} has "
            f"by itself (end of text: {tokenizer.eos_token}){template}. Copy the file from where the model is from"
        ]
    return []


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    rows = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    beyond = {token: id for token, id in tokenizer.get_vocab().items() if id >= rows}
    if not beyond:
        return []
    found = f"the tokenizer has token ids up to {max(beyond.values())}, and the model's embedding has {rows} rows"
    # Gemma 3 of 1B has a token for images, which only its larger sisters have a row for
    template = str(tokenizer.chat_template or "")
    named = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} - named
    if all(token in special and token not in template for token in beyond):
        return [f"{found}: {', '.join(sorted(beyond))} must not be in the data"]
    raise ModelError(
        found,
        where="model.tokenizer, or model.path",
        fix="give the tokenizer that belongs to the model, or a model that was saved after "
        f"resize_token_embeddings({max(beyond.values()) + 1})",
    )

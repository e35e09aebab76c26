"""Load the tokenizer of a model."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from functools import partial
from typing import Any, NoReturn

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from deca_ds.config.hub import cached_files, hub_fix, why_not_whole
from deca_ds.config.paths import check_model_path
from deca_ds.config.schema import ModelConfig
from deca_ds.engine.explain import BAD_FILE, explained
from deca_ds.errors import ModelError

# with these transformers' tokenizers begin or end the names of their vocabularies
_VOCABULARY = re.compile(r"^tokenizer\.|^vocab|^merges|spiece|sentencepiece|tekken|\.(model|tiktoken|vocab|bpe)$")


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

"""The generation config of a trained model: generation stops where training taught it to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

_NAME = "generation_config.json"
_ANSWER = "deca-answer"


def save_generation_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> str | None:
    """Write the model's generation config to `folder`, with `adapt`; returns what that says."""
    config = model.generation_config
    note = adapt(config, tokenizer)
    config.to_json_file(folder / _NAME)  # save_pretrained refuses some that from_pretrained takes
    return note


def adapt_saved(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Call `adapt` for the generation config that `folder` holds, if there is one; returns what that says."""
    if not (folder / _NAME).is_file():
        return None
    config = GenerationConfig.from_pretrained(folder)
    note = adapt(config, tokenizer)
    config.to_json_file(folder / _NAME)
    return note


def adapt(config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Let `config` stop at every token that ends what is trained on, and start and pad as the tokenizer does.

    These ends are the tokenizer's end of text and what the chat template writes after an assistant's turn; the model's
    own come first and stay. Returns a line that says what stops generation where it is more than one token, or None.
    """
    own = config.eos_token_id
    own = [own] if isinstance(own, int) else list(own or [])
    trained = [tokenizer.eos_token_id, turn_end(tokenizer)]
    stops = list(dict.fromkeys([*own, *(token for token in trained if token is not None)]))
    config._from_model_config = False  # or generation would take config.json's tokens
    if stops:
        config.eos_token_id = stops if len(stops) > 1 else stops[0]
    for name in ("bos_token_id", "pad_token_id"):
        if getattr(tokenizer, name) is not None:
            setattr(config, name, getattr(tokenizer, name))
    if len(stops) < 2:
        return None
    names = ", ".join(f"{tokenizer.convert_ids_to_tokens(token)} ({token})" for token in stops)
    return f"generation stops at any of {names}: eos_token_id in {_NAME}"


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the special token that the chat template writes after an assistant's turn; None where there is none."""
    if not tokenizer.chat_template:
        return None
    messages: list[dict[str, Any]] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    parts = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in messages]
    system = [{"role": "system", "content": "!"}, *messages]
    for conversation in (messages, parts, system):  # some templates want text, some lists of parts or a system turn
        try:
            text = tokenizer.apply_chat_template(conversation, tokenize=False)
        except (TemplateError, TypeError, ValueError, ArithmeticError):
            continue
        if isinstance(text, str) and _ANSWER in text:
            after = tokenizer(text.rpartition(_ANSWER)[2].lstrip(), add_special_tokens=False).input_ids
            special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} - {tokenizer.unk_token_id}
            return after[0] if after and after[0] in special else None
    return None

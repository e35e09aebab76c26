"""One model that is talked to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
)
from transformers.utils import logging

from deca_ds.data.template import ERRORS
from deca_ds.engine.explain import BAD_FILE, explained
from deca_ds.engine.tokenizer import tokenizer_in
from deca_ds.errors import ModelError


@dataclass(frozen=True)
class Sampling:
    """temperature: 0 takes the likeliest token each time. tokens: at most so many new ones an answer."""

    temperature: float
    tokens: int


class Speaker:
    """A causal language model, its tokenizer, and the conversation so far, in the model's own words.

    Without a chat template the model continues the text of all that was said. plain: it does in any case. Raises
    ModelError for what is no causal language model.
    """

    def __init__(self, name: str, device: torch.device, *, plain: bool = False, trust_remote_code: bool = False):
        logging.disable_progress_bar()
        self._tokenizer = tokenizer_in(name, "MODEL", trust_remote_code=trust_remote_code)
        with explained(name, "MODEL", BAD_FILE):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                name, dtype="auto", trust_remote_code=trust_remote_code, output_loading_info=True
            )
        model, info = loaded
        if lacking := sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"]):
            raise ModelError(
                f"{name!r} has no weights for {lacking[0]}" + f" and {len(lacking) - 1} more" * (len(lacking) > 1),
                where="MODEL",
                fix="name a causal language model",
            )
        self._model: PreTrainedModel = model.to(device).eval()
        self._turns: list[tuple[str, str]] = []
        self.name, self.has_template = name, bool(self._tokenizer.chat_template) and not plain

    def answer(self, prompt: str, sampling: Sampling, say: Callable[[str], None]) -> str:
        """Generate what the model says to `prompt` after the turns that were kept. say: called with each piece of it,
        as soon as it stands. Raises ModelError where there is no room for an answer."""
        inputs = self.encode(prompt).to(self._model.device)
        length = inputs["input_ids"].shape[1]
        positions = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        most = positions or length + sampling.tokens
        if length >= most:
            raise ModelError(
                f"the conversation has {length} tokens, and the model positions for {most}",
                where=self.name,
                fix="/reset, or a shorter prompt",
            )
        streamer = _Streamer(self._tokenizer, say)
        generate: Any = self._model.generate
        with torch.inference_mode():
            tokens = generate(**inputs, generation_config=self._generation(sampling, most - length), streamer=streamer)
        return streamer.text if self.has_template else self._continuation(tokens[0], length) or streamer.text

    def _continuation(self, tokens: Tensor, length: int) -> str:
        """Return the text of `tokens` from `length` on, with a first space that some tokenizers drop."""
        whole, before = (
            str(self._tokenizer.decode(part, skip_special_tokens=True)) for part in (tokens, tokens[:length])
        )
        return whole.removeprefix(before) if whole.startswith(before) else ""

    def keep(self, prompt: str, answer: str) -> None:
        """Make both a part of the conversation from now on."""
        self._turns.append((prompt, answer))

    def reset(self) -> None:
        """Forget the conversation."""
        self._turns.clear()

    def encode(self, prompt: str) -> Any:
        """Return the tokens of the conversation with `prompt` as its next turn, as the model takes them."""
        if not self.has_template:
            text = "".join(f"{asked}{said}\n" for asked, said in self._turns) + prompt
            return self._tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        messages = [
            {"role": role, "content": text}
            for turn in self._turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        messages.append({"role": "user", "content": prompt})
        try:
            return self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        except ERRORS as error:
            raise ModelError(
                f"the chat template refuses the conversation: {error}", where=self.name, fix="/reset, or ask otherwise"
            ) from error

    def _generation(self, sampling: Sampling, room: int) -> GenerationConfig:
        """Return the model's own settings, with its special tokens and its kind of sampling; greedy decoding takes the
        special tokens alone, and so is the same for all models."""
        given = self._model.generation_config
        own = {} if given is None else given.to_diff_dict()
        if sampling.temperature:
            own |= {"do_sample": True, "temperature": sampling.temperature}
        else:
            own = {key: value for key, value in own.items() if key.endswith("_token_id")} | {"do_sample": False}
        if own.get("pad_token_id") is None:
            ends = own.get("eos_token_id")
            own["pad_token_id"] = ends[0] if isinstance(ends, list) else ends
        own |= {"max_length": None, "min_length": None, "max_new_tokens": min(sampling.tokens, room)}
        return GenerationConfig(**own)


class _Streamer(TextStreamer):
    def __init__(self, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text, self._say = "", say

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """See TextStreamer."""
        self.text += text
        if text:
            self._say(text)

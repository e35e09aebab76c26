"""From examples to token ids and labels: where the loss falls, how long examples are cut, how they are packed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Features, List, Value
from datasets.fingerprint import Hasher
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from deca_ds.errors import DataError

IGNORED = -100  # the label of a token that carries no loss
_ENCODING_VERSION = 1  # raise it when the same example gives other tokens: encoded examples are cached
_MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")

_TOKENS = {"input_ids": List(Value("int32")), "labels": List(Value("int32")), "targets": Value("int32")}
SEQUENCES = Features(_TOKENS | {"cut": Value("bool")})
CANDIDATES = Features(_TOKENS | {name: Value("int32") for name in ("example", "candidate", "label")})
PIECES = Features({name: Value("string") for name in ("text", "group")} | {"ids": List(Value("int32"))})

Batch = dict[str, list[Any]]


@dataclass(frozen=True)
class _Encoded:
    """Token ids of one example. The first `prompt` of them may be cut away from the left; `answer` marks the loss."""

    ids: list[int]
    answer: list[bool]
    prompt: int


class Encoder:
    """Turns batches of examples into sequences of at most `max_length` tokens.

    words: for classification, label value -> answer word. A BOS is put in front if the tokenizer puts one by default,
    an EOS behind if the tokenizer has one. Conversations get exactly what the chat template writes.
    Raises DataError for a missing chat template, and if `max_length` cannot hold an answer word.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        answers_only: bool = True,
        words: Mapping[str, str] | None = None,
        conversations: bool = False,
    ):
        self.tokenizer, self.max_length, self.answers_only = tokenizer, max_length, answers_only
        self.words = dict(words or {})
        self.label_names = list(dict.fromkeys(self.words.values()))
        default = tokenizer("a").input_ids
        plain = tokenizer("a", add_special_tokens=False).input_ids
        self.bos = default[:1] if default[:1] == [tokenizer.bos_token_id] and plain[:1] != default[:1] else []
        self.eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.template = _chat_template(tokenizer) if conversations else ""
        for word in self.label_names:
            length = len(self._tokens([" " + word])[0]) + len(self.eos)
            if length > max_length - max_length // 2:
                raise DataError(
                    f"the answer {word!r} has {length} tokens, too many beside a prompt in {max_length}",
                    where="data.max_length",
                    fix=f"set it to at least {2 * length - 1} or choose shorter data.label_names",
                )

    @property
    def fingerprint(self) -> str:
        """The same in every process for the same tokenizer and settings (a pickled tokenizer is not)."""
        tokenizer = self.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        state: Any = sorted(tokenizer.get_vocab().items())
        if backend is not None:
            # truncation and padding change with every call that uses them, and are not used here
            state = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("truncation", "padding")}
        settings = (self.max_length, self.answers_only, self.words, self.bos, self.eos, self.template)
        return Hasher.hash((_ENCODING_VERSION, type(tokenizer).__name__, json.dumps(state), settings))

    def sequences(self, batch: Batch) -> Batch:
        """A batched map to SEQUENCES; examples without a single token to predict are left out.

        targets: number of tokens with a loss; the first token of a sequence is never predicted. cut: tokens were lost.
        """
        if "messages" in batch:
            encoded = [self._conversation(messages) for messages in batch["messages"]]
        elif "prompt" in batch:
            answers = [" " + self.words[label] for label in batch["answer"]] if self.words else batch["answer"]
            encoded = self._pairs(batch["prompt"], answers)
        else:
            encoded = self._texts(batch["text"], batch.get("ids"))
        rows = [self._row(one, answers_only=self.answers_only) for one in encoded]
        return _columns([row for row in rows if row["targets"]], SEQUENCES)

    def candidates(self, batch: Batch, indices: list[int]) -> Batch:
        """A batched map with indices to CANDIDATES: a row for each classification example and each answer word.

        The loss is on the answer. example: index of the example; candidate, label: indices in `label_names`. The
        candidates of an example share the same, equally cut prompt.
        """
        names, rows = self.label_names, []
        encoded = self._pairs(
            [prompt for prompt in batch["prompt"] for _ in names],
            [" " + name for _ in batch["prompt"] for name in names],
        )
        for place, (example, value) in enumerate(zip(indices, batch["answer"], strict=True)):
            of_example = encoded[place * len(names) : (place + 1) * len(names)]
            longest = max(len(one.ids) - one.prompt for one in of_example)
            for candidate, one in enumerate(of_example):
                ids = {"example": example, "candidate": candidate, "label": names.index(self.words[value])}
                rows.append(self._row(one, answers_only=True, reserve=longest) | ids)
        return _columns(rows, CANDIDATES)

    def pieces(self, batch: Batch) -> Batch:
        """A batched map of text examples to PIECES: documents are cut into consecutive runs of max_length tokens."""
        rows = []
        for text, document, group in zip(batch["text"], batch["document"], batch["group"], strict=True):
            if not document:
                rows.append({"text": text, "group": group, "ids": []})
                continue
            ids = self.bos + self._tokens([text])[0] + self.eos
            for start in range(0, len(ids), self.max_length):
                rows.append({"text": "", "group": group, "ids": ids[start : start + self.max_length]})
        return _columns(rows, PIECES)

    def _texts(self, texts: Sequence[str], ids: Sequence[list[int]] | None) -> list[_Encoded]:
        whole = [self.bos + tokens + self.eos for tokens in self._tokens(texts)]
        if ids is not None:
            whole = [piece or tokens for piece, tokens in zip(ids, whole, strict=True)]
        return [_Encoded(tokens, [True] * len(tokens), 0) for tokens in whole]

    def _pairs(self, prompts: Sequence[str], answers: Sequence[str]) -> list[_Encoded]:
        # Tokenised as one text, because many tokenizers put a blank before whatever they are given on its own.
        alone = self._tokens(prompts)
        together = self._tokens([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)])
        encoded = []
        for prompt, both in zip(alone, together, strict=True):
            start = len(self.bos) + _common_prefix(prompt, both)
            ids = self.bos + both + self.eos
            encoded.append(_Encoded(ids, [place >= start for place in range(len(ids))], start))
        return encoded

    def _conversation(self, messages: list[dict[str, str]]) -> _Encoded:
        if not self.answers_only:
            ids = self._tokens([self._apply_template(messages, messages, tokenize=False)])[0]
            return _Encoded(ids, [True] * len(ids), 0)
        if _MARKS_ANSWERS.search(self.template):
            options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
            marked = self._apply_template(messages, messages, **options)
            ids, answer = list(marked["input_ids"]), [bool(mark) for mark in marked["assistant_masks"]]
        else:
            ids, answer = self._answers_by_prefix(messages)
        return _Encoded(ids, answer, answer.index(True) if True in answer else 0)

    def _answers_by_prefix(self, messages: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
        turns = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        texts = [self._apply_template(messages, messages, tokenize=False)]
        for place in turns:
            before = {"tokenize": False, "add_generation_prompt": True}
            texts.append(self._apply_template(messages[:place], messages, **before) if place else "")
            texts.append(self._apply_template(messages[: place + 1], messages, tokenize=False))
        if not all(texts[0].startswith(text) for text in texts):
            raise DataError(
                "the chat template writes earlier messages differently once later ones follow, so the answers in "
                f"{_shown(messages)} cannot be told from the prompts",
                where="the tokenizer's chat_template",
                fix="use a template that marks answers with {% generation %}, or set data.answers_only=false",
            )
        ids, *prefixes = self._tokens(texts)
        ends = [_common_prefix(prefix, ids) for prefix in prefixes]
        answer = [False] * len(ids)
        for start, end in zip(ends[::2], ends[1::2], strict=True):
            answer[start:end] = [True] * (end - start)
        return ids, answer

    def _apply_template(self, messages: list[dict[str, str]], whole: list[dict[str, str]], **options: bool) -> Any:
        try:
            return self.tokenizer.apply_chat_template(messages, **options)
        except TemplateError as error:
            raise DataError(
                f"the chat template refuses {_shown(whole)}: {error}",
                where="data.train, data.per_client or an evaluation set",
                fix="bring the messages into the order that the template asks for",
            ) from error

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids

    def _row(self, one: _Encoded, *, answers_only: bool, reserve: int | None = None) -> dict[str, Any]:
        """One sequence. Of a prompt and an answer that are too long together the prompt loses its left part, down to
        half of max_length, then the answer its right part; a BOS stays. reserve: room to leave for the answer."""
        answer_length = len(one.ids) - one.prompt if reserve is None else reserve
        prompt = min(one.prompt, max(self.max_length - answer_length, self.max_length // 2))
        first = min(len(self.bos), prompt) if one.ids[:1] == self.bos else 0
        kept = [*range(first), *range(one.prompt - prompt + first, len(one.ids))][: self.max_length]
        ids = [one.ids[place] for place in kept]
        labels = [one.ids[place] if one.answer[place] or not answers_only else IGNORED for place in kept]
        targets = sum(label != IGNORED for label in labels[1:])
        return {"input_ids": ids, "labels": labels, "targets": targets, "cut": len(kept) < len(one.ids)}


def pack(batch: Batch, max_length: int) -> Batch:
    """A batched map of SEQUENCES: whole sequences one after the other, as many in a row as fit into max_length.

    The first token of every sequence stays without a loss, so the targets are those of the unpacked sequences.
    Attention is not separated: a token also sees the sequences packed before its own, with an EOS between.
    """
    rows: list[dict[str, Any]] = []
    for ids, labels, targets, cut in zip(*(batch[name] for name in SEQUENCES), strict=True):
        labels = [IGNORED, *labels[1:]]
        if rows and len(rows[-1]["input_ids"]) + len(ids) <= max_length:
            row = rows[-1]
            row["input_ids"], row["labels"] = row["input_ids"] + ids, row["labels"] + labels
            row["targets"], row["cut"] = row["targets"] + targets, row["cut"] or cut
        else:
            rows.append({"input_ids": ids, "labels": labels, "targets": targets, "cut": cut})
    return _columns(rows, SEQUENCES)


def _columns(rows: Sequence[Mapping[str, Any]], features: Features) -> Batch:
    return {name: [row[name] for row in rows] for name in features}


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


def _chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise DataError(
            "the tokenizer has no chat template, which data.format messages and sharegpt need",
            where="model.tokenizer, or model.path",
            fix="name an instruction-tuned model's tokenizer, or put a chat_template.jinja into the folder",
        ) from error


def _shown(messages: list[dict[str, str]]) -> str:
    return "the conversation " + repr(" / ".join(f"{turn['role']}: {turn['content']}" for turn in messages)[:120])

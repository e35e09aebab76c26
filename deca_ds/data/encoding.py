"""From examples to token ids and labels: where the loss falls, how long examples are cut, how they are packed."""

from __future__ import annotations

import datetime
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from datasets import Features, List, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from deca_ds.data.code import code_of
from deca_ds.data.layout import Conversations
from deca_ds.data.rows import Batch
from deca_ds.data.template import ChatTemplate
from deca_ds.data.tokens import Spanning
from deca_ds.errors import DataError

IGNORED = -100  # the label of a token that carries no loss

_TOKENS = {"input_ids": List(Value("int32")), "labels": List(Value("int32")), "targets": Value("int32")}
SEQUENCES = Features(_TOKENS | {"length": Value("int32")})
CANDIDATES = Features(_TOKENS | {name: Value("int32") for name in ("example", "candidate", "label")})
PIECES = Features({name: Value("string") for name in ("text", "group")} | {"ids": List(Value("int32"))})


@dataclass(frozen=True)
class _Encoded:
    """Token ids of one example. The first `prompt` of them may be cut away from the left; `answer` marks the loss."""

    ids: list[int]
    answer: list[bool]
    prompt: int


class Encoder:
    """Turns batches of examples into sequences of at most `max_length` tokens.

    words: for classification, label value -> answer word. A BOS is put in front if the tokenizer puts one by default,
    an EOS behind if the tokenizer has one, unless the text has them already. Conversations get exactly what the chat
    template writes, on the day `date`. What carries the loss is decoded and compared with the text for every example
    (deca_ds/data/tokens.py).
    Raises DataError for a missing chat template, if `max_length` cannot hold an answer word, and for two words that are
    the same tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        answers_only: bool = True,
        words: Mapping[str, str] | None = None,
        conversations: bool = False,
        date: datetime.date | None = None,
    ):
        self.tokenizer, self.max_length, self.answers_only = tokenizer, max_length, answers_only
        self.words = dict(words or {})
        self.label_names = list(dict.fromkeys(self.words.values()))
        default = tokenizer("a").input_ids
        plain = tokenizer("a", add_special_tokens=False).input_ids
        self.bos = default[:1] if default[:1] == [tokenizer.bos_token_id] and plain[:1] != default[:1] else []
        self.eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.spanning = Spanning(tokenizer)
        self.template = ChatTemplate(tokenizer, date or datetime.date.today()) if conversations else None
        if self.template is not None:
            self.chats = Conversations(self.template, tokenizer.all_special_tokens, answers_only=answers_only)
        self.notes = [] if self.template is None else self.chats.notes()
        for word in self.label_names:
            length = len(self._answer(word))
            if length > max_length - max_length // 2:
                raise DataError(
                    f"the answer {word!r} has {length} tokens, too many beside a prompt in {max_length}",
                    where="data.max_length",
                    fix=f"set it to at least {2 * length - 1} or choose shorter data.label_names",
                )
        self._look_at_words()

    def _look_at_words(self) -> None:
        """Note the words that the tokenizer changes, for example by lowercasing. Raises DataError for two words that it
        cannot tell apart."""
        known: dict[tuple[int, ...], str] = {}
        for word in self.label_names:
            other = known.setdefault(tuple(self._answer(word)), word)
            if other != word:
                raise DataError(
                    f"the tokenizer makes the same tokens of the answers {other!r} and {word!r}",
                    where="data.label_names",
                    fix="give these labels words that differ in more, or use another tokenizer",
                )
            read = cast(str, self.tokenizer.decode(self._tokens([" " + word])[0], skip_special_tokens=False))
            if "".join(read.split()) != "".join(word.split()):
                self.notes.append(f"the tokenizer reads the answer {word!r} as {read.strip()!r}: so the model answers")

    def _answer(self, word: str) -> list[int]:
        return self._tokens([" " + word])[0] + self.eos

    @property
    def fingerprint(self) -> str:
        """The same in every process for the same tokenizer and settings (a pickled tokenizer is not)."""
        # a template writes special tokens by their names
        template = None if self.template is None else (self.template.sources, str(self.tokenizer.special_tokens_map))
        settings = (self.max_length, self.answers_only, self.words, self.bos, self.eos, template)
        digest: str = Hasher.hash((_state(self.tokenizer), settings))
        return digest

    def sequences(self, batch: Batch) -> Batch:
        """Map a batch of examples to SEQUENCES; examples without a single token to predict are left out.

        targets: number of tokens with a loss; the first token of a sequence is never predicted. length: tokens before
        the sequence was cut.
        """
        if "conversation" in batch:
            encoded = self._conversations(batch["conversation"], batch["place"])
        elif "prompt" in batch:
            answers = [" " + self.words[label] for label in batch["answer"]] if self.words else batch["answer"]
            encoded = self._pairs(batch["prompt"], answers, batch["place"], answers_only=self.answers_only)
        else:
            encoded = self._texts(batch["text"], batch.get("ids"))
        rows = [self._row(one) for one in encoded]
        return _columns([row for row in rows if row["targets"]], SEQUENCES)

    def candidates(self, batch: Batch, indices: list[int]) -> Batch:
        """Map a batch of examples with their indices to CANDIDATES: a row for each classification example and each
        answer word.

        The loss is on the answer. example: index of the example; candidate, label: indices in `label_names`. The
        candidates of an example share the same, equally cut prompt.
        """
        names, rows = self.label_names, []
        encoded = self._pairs(
            [prompt for prompt in batch["prompt"] for _ in names],
            [" " + name for _ in batch["prompt"] for name in names],
            [place for place in batch["place"] for _ in names],
            answers_only=True,
        )
        for place, (example, value) in enumerate(zip(indices, batch["answer"], strict=True)):
            of_example = encoded[place * len(names) : (place + 1) * len(names)]
            longest = max(len(one.ids) - one.prompt for one in of_example)
            for candidate, one in enumerate(of_example):
                ids = {"example": example, "candidate": candidate, "label": names.index(self.words[value])}
                rows.append(self._row(one, reserve=longest) | ids)
        return _columns(rows, CANDIDATES)

    def pieces(self, batch: Batch) -> Batch:
        """Map a batch of text examples to PIECES: documents are cut into consecutive runs of max_length tokens."""
        rows = []
        for text, document, group in zip(batch["text"], batch["document"], batch["group"], strict=True):
            if not document or not text:
                rows.append({"text": text, "group": group, "ids": []})
                continue
            ids = self._framed(self._tokens([text])[0])
            for start in range(0, len(ids), self.max_length):
                rows.append({"text": "", "group": group, "ids": ids[start : start + self.max_length]})
        return _columns(rows, PIECES)

    def _texts(self, texts: Sequence[str], ids: Sequence[list[int]] | None) -> list[_Encoded]:
        pairs = zip(texts, self._tokens(texts), strict=True)  # a blank text has nothing to learn
        whole = [self._framed(tokens) if text.strip() else [] for text, tokens in pairs]
        if ids is not None:
            whole = [piece or tokens for piece, tokens in zip(ids, whole, strict=True)]
        return [_Encoded(tokens, [True] * len(tokens), 0) for tokens in whole]

    def _pairs(
        self, prompts: Sequence[str], answers: Sequence[str], places: Sequence[str], *, answers_only: bool
    ) -> list[_Encoded]:
        # Tokenised as one text, because many tokenizers put a blank before whatever they are given on its own.
        both = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        spans = [[(len(prompt), len(text))] for prompt, text in zip(prompts, both, strict=True)]
        encoded = []
        for tokens, ((start, _),) in self.spanning.encode(both, spans, places):
            ids = self._framed(tokens)
            start += len(self.bos) * (tokens[:1] != self.bos)
            encoded.append(_Encoded(ids, [not answers_only] * start + [True] * (len(ids) - start), start))
        return encoded

    def _conversations(self, conversations: Sequence[str], places: Sequence[str]) -> list[_Encoded]:
        texts, spans = [], []
        for conversation, place in zip(conversations, places, strict=True):
            text, trained, left_out = self.chats.render(json.loads(conversation), place)
            texts.append(text)
            spans.append(trained if self.answers_only else left_out)
        encoded = []
        for ids, found in self.spanning.encode(texts, spans, places):
            answer = [not self.answers_only] * len(ids)
            for first, end in found:
                answer[first:end] = [self.answers_only] * (end - first)
            encoded.append(_Encoded(ids, answer, answer.index(True) if True in answer else 0))
        return encoded

    def _framed(self, tokens: list[int]) -> list[int]:
        """Return `tokens` with BOS and EOS around them, each once."""
        before = [] if tokens[:1] == self.bos else self.bos
        after = [] if tokens[-1:] == self.eos else self.eos
        return before + tokens + after

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        return self.spanning.tokens(texts)

    def _row(self, one: _Encoded, *, reserve: int | None = None) -> dict[str, Any]:
        """Make one sequence. If prompt and answer are too long together, the prompt loses its left part, down to half
        of max_length, then the answer its right part; a BOS stays. reserve: room to leave for the answer."""
        answer_length = len(one.ids) - one.prompt if reserve is None else reserve
        prompt = min(one.prompt, max(self.max_length - answer_length, self.max_length // 2))
        first = min(len(self.bos), prompt) if one.ids[:1] == self.bos else 0
        start = one.prompt - prompt + first
        ids, answer = one.ids, one.answer
        if start > first:
            ids, answer = ids[:first] + ids[start:], answer[:first] + answer[start:]
        ids, answer = ids[: self.max_length], answer[: self.max_length]
        labels = ids if all(answer) else [token if kept else IGNORED for token, kept in zip(ids, answer, strict=True)]
        targets = len(labels[1:]) - labels[1:].count(IGNORED)
        return {"input_ids": ids, "labels": labels, "targets": targets, "length": len(one.ids)}


def pack(batch: Batch, max_length: int) -> Batch:
    """Map a batch of SEQUENCES to rows of whole sequences one after the other, as many in a row as fit into max_length.

    The first token of every sequence stays without a loss, so the targets are those of the unpacked sequences.
    Attention is not separated: a token also sees the sequences packed before its own, with an EOS between.
    """
    rows: list[dict[str, Any]] = []
    for ids, labels, targets, length in zip(*(batch[name] for name in SEQUENCES), strict=True):
        labels = [IGNORED, *labels[1:]]
        if rows and len(rows[-1]["input_ids"]) + len(ids) <= max_length:
            row = rows[-1]
            row["input_ids"], row["labels"] = row["input_ids"] + ids, row["labels"] + labels
            row["targets"], row["length"] = row["targets"] + targets, row["length"] + length
        else:
            rows.append({"input_ids": ids, "labels": labels, "targets": targets, "length": length})
    return _columns(rows, SEQUENCES)


def _state(tokenizer: PreTrainedTokenizerBase) -> tuple[Any, ...]:
    """Return everything that determines which tokens a tokenizer makes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # truncation and padding change with every call that uses them, and are not used here
        state = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("truncation", "padding")}
        return code_of(type(tokenizer)), json.dumps(state), tokenizer.split_special_tokens
    with tempfile.TemporaryDirectory() as folder:  # vocabulary, merges, sentencepiece model, settings
        tokenizer.save_pretrained(folder)
        files = [(path.name, path.read_bytes()) for path in sorted(Path(folder).iterdir()) if path.is_file()]
    return code_of(type(tokenizer)), sorted(tokenizer.get_vocab().items()), files


def _columns(rows: Sequence[Mapping[str, Any]], features: Features) -> Batch:
    return {name: [row[name] for row in rows] for name in features}

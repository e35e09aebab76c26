"""Prepares one client's token sequences, as the configuration says, and keeps them as an entry of the cache.

The key of an entry covers everything that it depends on: the code, the content of the files, the tokenizer, the
settings. It covers every key of the section data except those that are known to change nothing.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import xxhash
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from deca_ds.config import Config
from deca_ds.config.data import DataConfig
from deca_ds.data.cache import Cache, Entry
from deca_ds.data.encoding import CANDIDATES, IGNORED, SEQUENCES, Encoder, pack
from deca_ds.data.formats import FORMATS
from deca_ds.data.formats.labels import look_of
from deca_ds.data.rows import BATCH, Scratch, Work, column, encode_rows
from deca_ds.data.selection import Draw, Examples, Selection, label_words
from deca_ds.errors import DataError
from deca_ds.plural import several

TRAIN, OWN, COMMON = "train", "own_evaluation", "common_evaluation"  # the entry's tables


class Preparation:
    """Prepares the data of one client as an entry of the cache: the tables TRAIN, OWN and COMMON, with one row for each
    sequence, and notes, which are the other fields of ClientData.

    first: read at most so many rows of each source. Raises ConfigError and DataError, as the modules say.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        client: int,
        cache: Cache,
        work: Work,
        first: int | None = None,
    ):
        self._selection = Selection(config, client, cache, work, first)
        self._data, self._tokenizer, self._client = config.data, tokenizer, client
        self._cache, self._work = cache, work
        self._encoder = _make_encoder(config.data, tokenizer, self._selection.words)

    def entry(self) -> Entry:
        """Return the entry; make it first if it is not in the cache."""
        parts = self._selection.parts()

        def make(folder: Path) -> dict[str, Any]:
            scratch = Scratch(folder.parent, self._work)
            notes = self._write_tables(self._selection.examples(scratch, self._encoder.pieces), folder, scratch)
            self._selection.check_unchanged(parts)
            return notes

        return self._cache.entry("tokens", {"encoder": self._encoder.fingerprint, **parts}, make)

    def examples(self, folder: Path) -> Examples:
        """Return the examples of which the entry is made. folder: an empty one, which must exist as long as they do."""
        return self._selection.examples(Scratch(folder, self._work), self._encoder.pieces)

    def _write_tables(self, examples: Examples, folder: Path, scratch: Scratch) -> dict[str, Any]:
        """Write the tables into `folder`; returns the notes."""
        found = examples.words != self._selection.words  # labels that only the files name
        encoder = _make_encoder(self._data, self._tokenizer, examples.words) if found else self._encoder
        sequences = self._sequences(examples.train, encoder, folder, scratch)
        length, count = column(sequences, "length"), len(examples.train)
        cut = pc.sum(pc.greater(length, pc.list_value_length(column(sequences, "input_ids")))).as_py()
        train = sequences
        if self._data.packing:
            packed = partial(pack, max_length=self._data.max_length)
            train = encode_rows(_table(folder, TRAIN), sequences, packed, SEQUENCES, "packing", self._work)
        summary = {
            "client": self._client,
            "train": len(train),
            "examples": count,
            "dropped": count - len(sequences),
            "cut": cut,
            "own_evaluation": self._write_evaluation(examples.own, encoder, _table(folder, OWN)),
            "common_evaluation": self._write_evaluation(examples.common, encoder, _table(folder, COMMON)),
            "train_tokens": pc.sum(pc.list_value_length(column(train, "input_ids"))).as_py(),
            "target_tokens": pc.sum(column(train, "targets")).as_py(),
            "labels": self._labels(examples),
        }
        return {
            "label_names": encoder.label_names,
            "answers": self._data.answers_only and not FORMATS[self._data.format].documents,
            "summary": summary,
            "lengths": sorted([one["values"], one["counts"]] for one in pc.value_counts(length).to_pylist()),
            "content": _content(folder),
            "notes": [*self._notes(examples), *_unknown(train, self._tokenizer), *encoder.notes],
        }

    def _sequences(self, examples: Dataset, encoder: Encoder, folder: Path, scratch: Scratch) -> Dataset:
        """Return the sequences to train on: in the entry's table, or in a scratch file if they are yet to be packed."""
        count, data = len(examples), self._data
        if data.packing:  # neighbours in a file are often alike: pack examples in a random order
            order = np.random.default_rng(self._selection.seed(Draw.PACKING, own=True)).permutation(count)
            made = scratch.encode(scratch.select(examples, order), encoder.sequences, SEQUENCES, "tokenising")
        else:
            path = _table(folder, TRAIN)
            made = encode_rows(path, examples, encoder.sequences, SEQUENCES, "tokenising", self._work)
        if not len(made):
            reason = f"none of its {count} examples has a token to learn" if count else "it got no examples"
            raise DataError(
                f"client {self._client} has nothing to train on: {reason}",
                where="data.per_client" if data.per_client else "data.train",
                fix="give more data or fewer cluster.clients; check data.max_length and that answers are not empty",
            )
        return made

    def _write_evaluation(self, examples: Dataset, encoder: Encoder, path: Path) -> int:
        """Write an evaluation table, unless it has no rows; returns the number of its examples."""
        if not len(examples):
            return 0
        if FORMATS[self._data.format].has_labels:
            encode, what = encoder.candidates, "tokenising"
            encode_rows(path, examples, encode, CANDIDATES, what, self._work, with_indices=True)
            return len(examples)
        return len(encode_rows(path, examples, encoder.sequences, SEQUENCES, "tokenising", self._work))

    def _labels(self, examples: Examples) -> dict[str, int]:
        """Count the training examples of each label, or of each group of the partition."""
        data, labels = self._data, Counter[str]()
        named = FORMATS[data.format].has_labels and data.partition_column in (None, data.label_column)
        groups = {one["values"]: one["counts"] for one in pc.value_counts(column(examples.train, "group")).to_pylist()}
        groups.pop("", None)
        for group, number in sorted(groups.items()):
            labels[examples.words[group] if named else group] += number
        return dict(labels)

    def _notes(self, examples: Examples) -> list[str]:
        names = sorted(examples.unused - {self._data.partition_column})
        notes = [f"not used: {', '.join(names)}"] if names else []
        places, count = examples.left_out.places, examples.left_out.count
        if count:
            more = f" and {count - len(places)} more" if count > len(places) else ""
            notes.append(f"left out, for want of a value: {several(count, 'row')} ({'; '.join(places)}{more})")
        alike: dict[str, list[str]] = {}
        for label in examples.words:
            alike.setdefault(look_of(label), []).append(label)
        for labels in alike.values():
            if len(labels) > 1:
                notes.append(f"labels of their own, though they look alike: {', '.join(map(repr, labels))}")
        return notes


def check_tokenizer(config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise the errors that a preparation would without any row: of chat template, end token and label_names."""
    _make_encoder(config.data, tokenizer, label_words(config.data))


def _table(folder: Path, name: str) -> Path:
    return folder / f"{name}.arrow"


def _content(folder: Path) -> str:
    """Return a digest of all sequences, which does not depend on where the files are."""
    total = xxhash.xxh3_128()
    for path in sorted(folder.iterdir()):
        total.update(path.name.encode())
        for batch in Dataset.from_file(str(path)).with_format("arrow").iter(BATCH):
            for name in ("input_ids", "labels"):
                part = batch.column(name).combine_chunks()
                total.update(part.value_lengths().to_numpy())
                total.update(part.flatten().to_numpy())
    return total.hexdigest()


def _unknown(train: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return a note on text that the tokenizer does not know, if there is any."""
    if tokenizer.unk_token_id in (None, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
        return []
    unknown, learned = 0, 0
    for batch in train.with_format("arrow").iter(BATCH):
        labels = pc.list_flatten(batch.column("labels"))
        unknown += pc.sum(pc.equal(labels, tokenizer.unk_token_id)).as_py() or 0
        learned += pc.sum(pc.not_equal(labels, IGNORED)).as_py() or 0
    if not unknown:
        return []
    token = tokenizer.unk_token
    return [
        f"{unknown} of {learned} tokens to learn are {token}, in the place of text that the tokenizer does not know"
    ]


def _make_encoder(data: DataConfig, tokenizer: PreTrainedTokenizerBase, words: Mapping[str, str]) -> Encoder:
    format = FORMATS[data.format]
    encoder = Encoder(
        tokenizer,
        max_length=data.max_length,
        answers_only=data.answers_only,
        words=words if format.has_labels else None,
        conversations="conversation" in format.features,
        date=datetime.date.fromisoformat(data.date) if data.date else None,
    )
    if data.packing and not encoder.eos:
        raise DataError(
            "the tokenizer has no end-of-text token to put between packed examples",
            where="data.packing",
            fix="set eos_token in the tokenizer's tokenizer_config.json, or data.packing=false",
        )
    return encoder

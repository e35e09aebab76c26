"""From the configuration to one client's token sequences, as an entry of the cache.

What is prepared is named by all that it depends on: the code, the content of the files, the tokenizer, the settings. A
key of the section data counts unless it is known not to.
"""

from __future__ import annotations

import datetime
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from datasets import Dataset, Features
from transformers import PreTrainedTokenizerBase

from deca_ds.config.data import DataConfig
from deca_ds.config.schema import Config
from deca_ds.data.cache import Cache, Entry
from deca_ds.data.checks import own_sources, validate_data_config
from deca_ds.data.code import code_of
from deca_ds.data.encoding import CANDIDATES, IGNORED, PIECES, SEQUENCES, Batch, Encoder, pack
from deca_ds.data.examples import check_unchanged, contents, read_examples
from deca_ds.data.formats import FORMATS, ExampleRules
from deca_ds.data.formats.labels import look_of, normal_label
from deca_ds.data.partition import Indices, by_key, choose, dirichlet, hold_out, iid
from deca_ds.data.rows import BATCH, Work, column, encode_rows, select_rows
from deca_ds.data.sources import Source, find_sources
from deca_ds.errors import ConfigError, DataError

TRAIN, OWN, COMMON = "train", "own_evaluation", "common_evaluation"  # the entry's tables
# keys that name files, which count by their content, or say what becomes of sequences later
_NOT_COUNTED = {"train", "per_client", "evaluation", "per_client_evaluation"}
_NOT_COUNTED |= {
    "date",
    "cache",
    "batch_size",
    "micro_batch_size",
}  # the day counts by what a chat template makes of it


class _Draw(IntEnum):
    """What a random choice is for: with the run's seed it gives every choice its own stream."""

    MAX_EXAMPLES, COMMON_HOLDOUT, PARTITION, CLIENT_HOLDOUT, EVALUATION, PACKING = range(6)


@dataclass(frozen=True)
class Examples:
    """What one client trains on and is scored on, before it becomes tokens: the format's columns, "group" and, but for
    pieces of documents, "place"."""

    train: Dataset
    own: Dataset
    common: Dataset


class Preparation:
    """What one client needs, from its files to an entry of the cache: TRAIN, OWN and COMMON, each a table with a row a
    sequence, and notes that are ClientData's other fields.

    first: read so many rows of each source and no more. Raises ConfigError and DataError, see the modules.
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
        validate_data_config(config, client)
        self.first = first
        self.config, self.data, self.tokenizer, self.client = config, config.data, tokenizer, client
        self.format, self.cache, self.work = FORMATS[config.data.format], cache, work
        self.words = _words(self.data)
        self.unused: set[str] = set()
        data, private = config.data, bool(config.data.per_client)
        self.sources = own_sources(data, "per_client", client) if private else find_sources(data.train, "data.train")
        self.own_sources = own_sources(data, "per_client_evaluation", client)
        self.common_sources = find_sources(data.evaluation, "data.evaluation")

    def entry(self) -> Entry:
        """The entry, made unless it is there."""
        self.encoder = self._encoder()
        rules = self._rules(training=True)
        sources = [*self.sources, *self.own_sources, *self.common_sources]
        content = contents(sources, rules, self.cache)
        parts = {
            "encoder": self.encoder.fingerprint,
            "format": code_of(self.format.example),
            "rules": asdict(rules),
            "content": [content, len(self.sources), len(self.own_sources)],
            "data": {key: value for key, value in asdict(self.data).items() if key not in _NOT_COUNTED},
            "private": bool(self.data.per_client),
            "client": [self.client, self.config.cluster.clients, self.config.run.seed],
            "evaluation": self.config.evaluation.max_examples,
        }

        def make(folder: Path) -> dict[str, Any]:
            notes = self._make(folder)
            check_unchanged(content, sources, rules, self.cache)
            return notes

        return self.cache.entry("tokens", parts, make)

    def examples(self, scratch: Path) -> Examples:
        """Read, partitioned and held out. scratch: an empty folder, which has to be there as long as they are."""
        self.encoder = self._encoder()
        return self._examples(scratch)

    def _make(self, folder: Path) -> dict[str, Any]:
        """Write the tables into `folder`; returns the notes."""
        self.folder = folder
        return self._encode(self._examples(folder.parent))

    def _examples(self, scratch: Path) -> Examples:
        self.scratch, self.made = scratch, 0
        data, private = self.data, bool(self.data.per_client)
        pool = self._read(self.sources, training=True)
        if self.format.has_labels and not self.words:
            self.words = {value: value for value in _in_order(pool.unique("answer"))}
            if len(self.words) < 2:
                raise DataError(
                    f"all examples have the one label {next(iter(self.words))!r}",
                    where=f"column {data.label_column!r} of data.train",
                    fix="set data.label_column, or data.label_names",
                )
            self.encoder = self._encoder()
        pool = self._cut_documents(pool)
        pool = self._select(pool, choose(len(pool), data.max_examples, self._seed(_Draw.MAX_EXAMPLES, own=private)))
        kept, common = hold_out(len(pool), data.common_holdout, self._seed(_Draw.COMMON_HOLDOUT))
        examples = self._select(pool, kept)
        if not private:
            examples = self._select(examples, self._partition(examples)[self.client])
        own = self._read_evaluation(self.own_sources)
        if own is None:
            kept, held = hold_out(len(examples), data.client_holdout, self._seed(_Draw.CLIENT_HOLDOUT, own=True))
            examples, own = self._select(examples, kept), self._select(examples, held)
        shared = self._read_evaluation(self.common_sources)
        shared = self._select(pool, common) if shared is None else shared
        return Examples(examples, self._some(own, own=True), self._some(shared))

    def _some(self, examples: Dataset, *, own: bool = False) -> Dataset:
        """Those of an evaluation set that are scored."""
        limit = self.config.evaluation.max_examples
        return self._select(examples, choose(len(examples), limit, self._seed(_Draw.EVALUATION, own=own)))

    def _select(self, dataset: Dataset, indices: Indices) -> Dataset:
        """These rows; which ones they are lies in a file."""
        self.made += 1
        return select_rows(dataset, indices, self.scratch / f"{self.made}.indices.arrow")

    def _encoder(self) -> Encoder:
        return _make_encoder(self.data, self.tokenizer, self.words)

    def _rules(self, *, training: bool) -> ExampleRules:
        data = self.data
        group = (data.partition_column or (data.label_column if self.format.has_labels else None)) or None
        return ExampleRules(
            format=data.format,
            text_columns=tuple(data.text_columns),
            label_column=data.label_column,
            labels=tuple(self.words) if self.format.has_labels else (),
            prompt=data.prompt,
            group_column=group if training else None,
            column_names=tuple(data.column_names),
            subset=data.subset,
            split=data.split,
            first=self.first,
        )

    def _read(self, sources: Sequence[Source], *, training: bool) -> Dataset:
        examples = read_examples(sources, self._rules(training=training), self.cache, self.work)
        for names in filter(None, examples.unique("unused")):
            self.unused.update(json.loads(names))
        return examples

    def _read_evaluation(self, sources: Sequence[Source]) -> Dataset | None:
        return self._cut_documents(self._read(sources, training=False)) if sources else None

    def _cut_documents(self, examples: Dataset) -> Dataset:
        if not self.format.documents or not any(examples.unique("document")):
            return examples
        return self._rows(examples, self.encoder.pieces, PIECES, "cutting documents")

    def _partition(self, examples: Dataset) -> list[Indices]:
        clients, seed = self.config.cluster.clients, self._seed(_Draw.PARTITION)
        if self.data.partition == "iid":
            return iid(len(examples), clients, seed)
        groups = _codes(column(examples, "group"))
        if self.data.partition == "key":
            return by_key(groups, clients)
        return dirichlet(groups, clients, self.data.alpha, seed, minimum=2 if self.data.client_holdout > 0 else 1)

    def _encode(self, of_client: Examples) -> dict[str, Any]:
        examples = of_client.train
        groups = {one["values"]: one["counts"] for one in pc.value_counts(column(examples, "group")).to_pylist()}
        groups.pop("", None)
        count, data = len(examples), self.data
        if data.packing:  # neighbours in a file are often alike: pack examples in a random order
            order = np.random.default_rng(self._seed(_Draw.PACKING, own=True)).permutation(count)
            examples = self._select(examples, order)
        train = self._rows(examples, self.encoder.sequences, SEQUENCES, "tokenising", None if data.packing else TRAIN)
        if not len(train):
            reason = f"none of its {count} examples has a token to learn" if count else "it got no examples"
            raise DataError(
                f"client {self.client} has nothing to train on: {reason}",
                where="data.per_client" if data.per_client else "data.train",
                fix="give more data or fewer cluster.clients; check data.max_length and that answers are not empty",
            )
        dropped, length = count - len(train), column(train, "length")
        cut = pc.sum(pc.greater(length, pc.list_value_length(column(train, "input_ids")))).as_py()
        lengths = sorted([one["values"], one["counts"]] for one in pc.value_counts(length).to_pylist())
        if data.packing:
            train = self._rows(train, partial(pack, max_length=data.max_length), SEQUENCES, "packing", TRAIN)
        own_count = self._encode_evaluation(of_client.own, OWN)
        common_count = self._encode_evaluation(of_client.common, COMMON)
        named = self.format.has_labels and data.partition_column in (None, data.label_column)
        labels: Counter[str] = Counter()
        for group, number in sorted(groups.items()):
            labels[self.words[group] if named else group] += number
        summary = {
            "client": self.client,
            "train": len(train),
            "examples": count,
            "dropped": dropped,
            "cut": cut,
            "own_evaluation": own_count,
            "common_evaluation": common_count,
            "train_tokens": pc.sum(pc.list_value_length(column(train, "input_ids"))).as_py(),
            "target_tokens": pc.sum(column(train, "targets")).as_py(),
            "labels": dict(labels),
        }
        return {
            "label_names": self.encoder.label_names,
            "summary": summary,
            "lengths": lengths,
            "content": self._content(),
            "notes": self._notes(train),
        }

    def _encode_evaluation(self, examples: Dataset, name: str) -> int:
        """Write the table `name`, unless it has no rows; returns its number of examples."""
        if not len(examples):
            return 0
        if self.format.has_labels:
            self._rows(examples, self.encoder.candidates, CANDIDATES, "tokenising", name, with_indices=True)
            return len(examples)
        return len(self._rows(examples, self.encoder.sequences, SEQUENCES, "tokenising", name))

    def _rows(
        self,
        dataset: Dataset,
        encode: Callable[..., Batch],
        features: Features,
        what: str,
        table: str | None = None,
        *,
        with_indices: bool = False,
    ) -> Dataset:
        """What `encode` makes of the rows, in the entry's table of this name, or where nobody needs it afterwards."""
        if table is None:
            self.made += 1
        path = self.scratch / f"{self.made}.arrow" if table is None else self.folder / f"{table}.arrow"
        return encode_rows(path, dataset, encode, features, what, self.work, with_indices=with_indices)

    def _content(self) -> str:
        """Of all sequences: the same wherever they are."""
        total = xxhash.xxh3_128()
        for path in sorted(self.folder.iterdir()):
            total.update(path.name.encode())
            for batch in Dataset.from_file(str(path)).with_format("arrow").iter(BATCH):
                for name in ("input_ids", "labels"):
                    part = batch.column(name).combine_chunks()
                    total.update(part.value_lengths().to_numpy())
                    total.update(part.flatten().to_numpy())
        return total.hexdigest()

    def _notes(self, train: Dataset) -> list[str]:
        names = sorted(self.unused - {self.data.partition_column})
        notes = [f"not used: {', '.join(names)}"] if names else []
        alike: dict[str, list[str]] = {}
        for label in self.words:
            alike.setdefault(look_of(label), []).append(label)
        for labels in alike.values():
            if len(labels) > 1:
                notes.append(f"labels of their own, though they look alike: {', '.join(map(repr, labels))}")
        tokenizer = self.tokenizer
        if tokenizer.unk_token_id not in (None, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
            unknown, learned = 0, 0
            for batch in train.with_format("arrow").iter(BATCH):
                labels = pc.list_flatten(batch.column("labels"))
                unknown += pc.sum(pc.equal(labels, tokenizer.unk_token_id)).as_py() or 0
                learned += pc.sum(pc.not_equal(labels, IGNORED)).as_py() or 0
            if unknown:
                notes.append(
                    f"{unknown} of {learned} tokens to learn are {tokenizer.unk_token}, in the place of text that "
                    "the tokenizer does not know"
                )
        return notes + self.encoder.notes

    def _seed(self, draw: _Draw, *, own: bool = False) -> list[int]:
        return [self.config.run.seed, int(draw), *([self.client + 1] if own else [])]


def check_tokenizer(config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise the errors that a preparation would without any row: of chat template, end token and label_names."""
    _make_encoder(config.data, tokenizer, _words(config.data))


def _words(data: DataConfig) -> dict[str, str]:
    """label -> answer word, as the configuration names them."""
    words: dict[str, str] = {}
    for value, word in data.label_names.items():
        label = normal_label(value)
        if words.setdefault(label, str(word)) != str(word):
            raise ConfigError(
                f"the label {label!r} has two words: {words[label]!r} and {str(word)!r}",
                where="data.label_names",
                fix="1, 1.0 and '1 ' are one label: name it once",
            )
    return words


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


def _codes(groups: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """A number for each value, in the order of the values: as lists of texts they would take ten times the memory."""
    places = pc.index_in(groups, value_set=pa.array(sorted(groups.unique().to_pylist())))
    codes: npt.NDArray[np.int64] = places.to_numpy().astype(np.int64)
    return codes


def _in_order(labels: Sequence[str]) -> list[str]:
    """Numbers by size, anything else as text."""
    try:
        return sorted(labels, key=float)
    except ValueError:
        return sorted(labels)

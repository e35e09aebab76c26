"""One client's data, from the configuration to token sequences."""

from __future__ import annotations

import contextlib
import datetime
import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from deca_ds.config.schema import Config
from deca_ds.data.checks import own_sources, validate_data_config
from deca_ds.data.encoding import CANDIDATES, PIECES, SEQUENCES, Batch, Encoder, pack
from deca_ds.data.examples import read_examples
from deca_ds.data.formats import FORMATS, ExampleRules
from deca_ds.data.formats.fields import normal_label
from deca_ds.data.partition import Indices, by_key, choose, dirichlet, hold_out, iid
from deca_ds.data.sources import Source, find_sources
from deca_ds.errors import ConfigError, DataError


class _Draw(IntEnum):
    """What a random choice is for: with the run's seed it gives every choice its own stream."""

    MAX_EXAMPLES, COMMON_HOLDOUT, PARTITION, CLIENT_HOLDOUT, EVALUATION, PACKING = range(6)


@dataclass(frozen=True)
class ClientData:
    """What one client trains on and is scored on.

    train: input_ids and labels (-100 where there is no loss), a sequence a row. own_evaluation, common_evaluation: the
    same columns, for classification a row for each example and answer word with the columns example, candidate and
    label. label_names: classification's answer words in the order of label and candidate. summary: counts, for JSON.
    notes: what the user should know of the files; they may name what only this client may see.
    """

    train: Dataset
    own_evaluation: Dataset | None
    common_evaluation: Dataset | None
    label_names: list[str]
    summary: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def load_client_data(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    client: int,
    *,
    leader_first: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    tick: Callable[[], None] = lambda: None,
) -> ClientData:
    """Read, partition, hold out and tokenise what client `client` needs; the same on all of its ranks.

    leader_first: a context manager in which one rank of the client goes first and fills the datasets cache.
    tick: called for every batch of examples that is tokenised.
    Of private files (per_client) only this client's are opened. Raises ConfigError and DataError, see the modules.
    """
    with leader_first():
        return _Loader(config, tokenizer, client, tick).load()


class _Loader:
    """The steps of `load_client_data`."""

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase, client: int, tick: Callable[[], None]):
        validate_data_config(config, client)
        self.config, self.data, self.tokenizer, self.client = config, config.data, tokenizer, client
        self.tick = tick
        self.words: dict[str, str] = {}
        for value, word in self.data.label_names.items():
            label = normal_label(value)
            if self.words.setdefault(label, str(word)) != str(word):
                raise ConfigError(
                    f"the label {label!r} has two words: {self.words[label]!r} and {str(word)!r}",
                    where="data.label_names",
                    fix="1, 1.0 and '1 ' are one label: name it once",
                )
        self.unused: set[str] = set()

    def load(self) -> ClientData:
        data = self.data
        private = bool(data.per_client)
        sources = own_sources(data, "per_client", self.client) if private else find_sources(data.train, "data.train")
        pool = self._read(sources, training=True)
        if data.format == "classification" and not self.words:
            self.words = {value: value for value in _in_order(pool.unique("answer"))}
            if len(self.words) < 2:
                raise DataError(
                    f"all examples have the one label {next(iter(self.words))!r}",
                    where=f"column {data.label_column!r} of data.train",
                    fix="set data.label_column, or data.label_names",
                )
        self.encoder = Encoder(
            self.tokenizer,
            max_length=data.max_length,
            answers_only=data.answers_only,
            words=self.words if data.format == "classification" else None,
            conversations="conversation" in FORMATS[data.format].features,
            date=datetime.date.fromisoformat(data.date) if data.date else None,
        )
        if data.packing and not self.encoder.eos:
            raise DataError(
                "the tokenizer has no end-of-text token to put between packed examples",
                where="data.packing",
                fix="set eos_token in the tokenizer's tokenizer_config.json, or data.packing=false",
            )
        pool = self._cut_documents(pool)
        pool = pool.select(choose(len(pool), data.max_examples, self._seed(_Draw.MAX_EXAMPLES, own=private)))
        kept, common = hold_out(len(pool), data.common_holdout, self._seed(_Draw.COMMON_HOLDOUT))
        examples = pool.select(kept)
        if not private:
            examples = examples.select(self._partition(examples)[self.client])
        own_files = own_sources(data, "per_client_evaluation", self.client)
        own = self._read_evaluation(own_files)
        if own is None:
            kept, held = hold_out(len(examples), data.client_holdout, self._seed(_Draw.CLIENT_HOLDOUT, own=True))
            examples, own = examples.select(kept), examples.select(held)
        shared = self._read_evaluation(find_sources(data.evaluation, "data.evaluation"))
        return self._encode(examples, own, pool.select(common) if shared is None else shared)

    def _read(self, sources: Sequence[Source], *, training: bool) -> Dataset:
        data = self.data
        group = (data.partition_column or (data.label_column if data.format == "classification" else None)) or None
        rules = ExampleRules(
            format=data.format,
            text_columns=tuple(data.text_columns),
            label_column=data.label_column,
            labels=tuple(self.words) if data.format == "classification" else (),
            prompt=data.prompt,
            group_column=group if training else None,
            column_names=tuple(data.column_names),
            subset=data.subset,
            split=data.split,
        )
        examples = read_examples(list(sources), rules)
        for names in filter(None, examples.unique("unused")):
            self.unused.update(json.loads(names))
        return examples

    def _read_evaluation(self, sources: Sequence[Source]) -> Dataset | None:
        return self._cut_documents(self._read(sources, training=False)) if sources else None

    def _cut_documents(self, examples: Dataset) -> Dataset:
        if self.data.format != "text" or not any(examples.unique("document")):
            return examples
        return self._map(examples, self.encoder.pieces, PIECES, "pieces")

    def _partition(self, examples: Dataset) -> list[Indices]:
        clients, seed = self.config.cluster.clients, self._seed(_Draw.PARTITION)
        if self.data.partition == "iid":
            return iid(len(examples), clients, seed)
        groups = examples["group"][:]  # as a whole: row by row takes many times as long
        if self.data.partition == "key":
            return by_key(groups, clients)
        return dirichlet(groups, clients, self.data.alpha, seed, minimum=2 if self.data.client_holdout > 0 else 1)

    def _encode(self, examples: Dataset, own: Dataset, common: Dataset) -> ClientData:
        groups = Counter(examples["group"][:])
        groups.pop("", None)
        count = len(examples)
        if self.data.packing:  # neighbours in a file are often alike: pack examples in a random order
            order = np.random.default_rng(self._seed(_Draw.PACKING, own=True)).permutation(count)
            examples = examples.select(order)
        train = self._map(examples, self.encoder.sequences, SEQUENCES, "sequences") if count else examples
        if not count or not len(train):
            reason = f"none of its {count} examples has a token to learn" if count else "it got no examples"
            raise DataError(
                f"client {self.client} has nothing to train on: {reason}",
                where="data.per_client" if self.data.per_client else "data.train",
                fix="give more data or fewer cluster.clients; check data.max_length and that answers are not empty",
            )
        dropped, cut = count - len(train), pc.sum(train.data.column("cut")).as_py()
        if self.data.packing:
            train = self._map(train, partial(pack, max_length=self.data.max_length), SEQUENCES, "pack")
        own_rows, own_count = self._encode_evaluation(own, own_set=True)
        common_rows, common_count = self._encode_evaluation(common, own_set=False)
        named = self.data.format == "classification" and self.data.partition_column in (None, self.data.label_column)
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
            "train_tokens": pc.sum(pc.list_value_length(train.data.column("input_ids"))).as_py(),
            "target_tokens": pc.sum(train.data.column("targets")).as_py(),
            "labels": dict(labels),
        }
        train = train.select_columns(["input_ids", "labels"])
        return ClientData(train, own_rows, common_rows, self.encoder.label_names, summary, self._notes())

    def _notes(self) -> list[str]:
        names = sorted(self.unused - {self.data.partition_column})
        notes = [f"not used: {', '.join(names)}"] if names else []
        return notes + self.encoder.notes

    def _encode_evaluation(self, examples: Dataset, *, own_set: bool) -> tuple[Dataset | None, int]:
        limit = self.config.evaluation.max_examples
        examples = examples.select(choose(len(examples), limit, self._seed(_Draw.EVALUATION, own=own_set)))
        if not len(examples):
            return None, 0
        if self.data.format == "classification":
            rows = self._map(examples, self.encoder.candidates, CANDIDATES, "candidates", with_indices=True)
            return rows.remove_columns("targets"), len(examples)
        rows = self._map(examples, self.encoder.sequences, SEQUENCES, "sequences")
        return (rows.select_columns(["input_ids", "labels"]), len(rows)) if len(rows) else (None, 0)

    def _map(
        self, dataset: Dataset, function: Callable[..., Batch], features: Features, name: str, **options: bool
    ) -> Dataset:
        # Named by hand: a hash of the function would hold the tokenizer's, which differs between processes.
        parts = (dataset._fingerprint, self.encoder.fingerprint, self.data.max_length, name)

        def ticking(*batch: Any) -> Batch:
            self.tick()
            return function(*batch)

        return dataset.map(
            ticking,
            batched=True,
            remove_columns=dataset.column_names,
            features=features,
            new_fingerprint=Hasher.hash(parts),
            **options,
        )

    def _seed(self, draw: _Draw, *, own: bool = False) -> list[int]:
        return [self.config.run.seed, int(draw), *([self.client + 1] if own else [])]


def _in_order(labels: Sequence[str]) -> list[str]:
    """Numbers by size, anything else as text."""
    try:
        return sorted(labels, key=float)
    except ValueError:
        return sorted(labels)

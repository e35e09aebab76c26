"""Which examples a client trains on and is scored on: read, shared out among the clients, and held out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from deca_ds.config import Config
from deca_ds.config.data import DataConfig
from deca_ds.data.cache import Cache
from deca_ds.data.checks import own_sources, validate_data_config
from deca_ds.data.code import code_of
from deca_ds.data.encoding import PIECES
from deca_ds.data.examples import LeftOut, ReadExamples, check_unchanged, contents, read_examples
from deca_ds.data.formats import FORMATS, ExampleRules
from deca_ds.data.formats.labels import normal_label
from deca_ds.data.partition import Indices, by_key, choose, dirichlet, hold_out, iid
from deca_ds.data.rows import Batch, Scratch, Work, column
from deca_ds.data.sources import Source, find_sources
from deca_ds.errors import ConfigError, DataError

# keys that name files, which count by their content, or say what becomes of sequences later
_NOT_COUNTED = {"train", "per_client", "evaluation", "per_client_evaluation"}
_NOT_COUNTED |= {
    "date",
    "cache",
    "batch_size",
    "micro_batch_size",
}  # the day counts by what a chat template makes of it


class Draw(IntEnum):
    """What a random choice is for: with the run's seed it gives every choice its own stream."""

    MAX_EXAMPLES, COMMON_HOLDOUT, PARTITION, CLIENT_HOLDOUT, EVALUATION, PACKING = range(6)


@dataclass(frozen=True)
class Examples:
    """What one client trains on and is scored on, before it becomes tokens: the format's columns, "group" and, but for
    pieces of documents, "place".

    words: for classification, label -> answer word. unused: names of fields in the files that nothing is done with.
    """

    train: Dataset
    own: Dataset
    common: Dataset
    words: dict[str, str]
    unused: frozenset[str]
    left_out: LeftOut


class Selection:
    """Selects the examples of one client from its files. first: read so many rows of each source and no more.

    words: label -> answer word, as the configuration names them. Raises ConfigError and DataError, see the modules.
    """

    def __init__(self, config: Config, client: int, cache: Cache, work: Work, first: int | None = None):
        validate_data_config(config, client)
        self._config, self._data, self._client, self._first = config, config.data, client, first
        self._format, self._cache, self._work = FORMATS[config.data.format], cache, work
        self.words = label_words(config.data)
        data, self._private = config.data, bool(config.data.per_client)
        self._train = (
            own_sources(data, "per_client", client) if self._private else find_sources(data.train, "data.train")
        )
        self._own = own_sources(data, "per_client_evaluation", client)
        self._common = find_sources(data.evaluation, "data.evaluation")

    def parts(self) -> dict[str, Any]:
        """Return all that the examples, and what is made of them, depend on beside the code; JSON-able."""
        data, rules = self._data, self._rules(self.words, training=True)
        return {
            "format": code_of(self._format.example),
            "rules": asdict(rules),
            "content": [contents(self._sources, rules, self._cache), len(self._train), len(self._own)],
            "data": {key: value for key, value in asdict(data).items() if key not in _NOT_COUNTED},
            "private": self._private,
            "client": [self._client, self._config.cluster.clients, self._config.run.seed],
            "evaluation": self._config.evaluation.max_examples,
        }

    def check_unchanged(self, parts: Mapping[str, Any]) -> None:
        """Raise DataError where files have changed since these `parts`."""
        check_unchanged(parts["content"][0], self._sources, self._rules(self.words, training=True), self._cache)

    def examples(self, scratch: Scratch, cut: Callable[[Batch], Batch]) -> Examples:
        """Read, partitioned and held out. cut: a batched map of documents to PIECES."""
        data = self._data
        pool, left_out = self._read(self._train, self.words, training=True)
        words, unused = self.words or self._words_of(pool), _unused(pool)

        def evaluation(sources: Sequence[Source]) -> Dataset | None:
            if not sources:
                return None
            examples, more = self._read(sources, words, training=False)
            left_out.add(more.places, more.count)
            unused.update(_unused(examples))
            return self._cut_documents(examples, scratch, cut)

        pool = self._cut_documents(pool, scratch, cut)
        limit = choose(len(pool), data.max_examples, self.seed(Draw.MAX_EXAMPLES, own=self._private))
        pool = scratch.select(pool, limit)
        kept, for_all = hold_out(len(pool), data.common_holdout, self.seed(Draw.COMMON_HOLDOUT))
        examples = scratch.select(pool, kept)
        if not self._private:
            examples = scratch.select(examples, self._partition(examples)[self._client])
        own = evaluation(self._own)
        if own is None:
            kept, held = hold_out(len(examples), data.client_holdout, self.seed(Draw.CLIENT_HOLDOUT, own=True))
            examples, own = scratch.select(examples, kept), scratch.select(examples, held)
        common = evaluation(self._common)
        if common is None:
            common = scratch.select(pool, for_all)
        own, common = self._scored(own, scratch, own=True), self._scored(common, scratch)
        return Examples(examples, own, common, words, frozenset(unused), left_out)

    def seed(self, draw: Draw, *, own: bool = False) -> list[int]:
        """Return the seed of a random choice. own: which every client makes for itself."""
        return [self._config.run.seed, int(draw), *([self._client + 1] if own else [])]

    @property
    def _sources(self) -> list[Source]:
        return [*self._train, *self._own, *self._common]

    def _scored(self, examples: Dataset, scratch: Scratch, *, own: bool = False) -> Dataset:
        """Select the examples of an evaluation set that are scored."""
        limit = self._config.evaluation.max_examples
        return scratch.select(examples, choose(len(examples), limit, self.seed(Draw.EVALUATION, own=own)))

    def _rules(self, words: Mapping[str, str], *, training: bool) -> ExampleRules:
        data = self._data
        group = (data.partition_column or (data.label_column if self._format.has_labels else None)) or None
        return ExampleRules(
            format=data.format,
            text_columns=tuple(data.text_columns),
            label_column=data.label_column,
            labels=tuple(words) if self._format.has_labels else (),
            prompt=data.prompt,
            group_column=group if training else None,
            column_names=tuple(data.column_names),
            subset=data.subset,
            split=data.split,
            incomplete=data.incomplete,
            first=self._first,
        )

    def _read(self, sources: Sequence[Source], words: Mapping[str, str], *, training: bool) -> ReadExamples:
        return read_examples(sources, self._rules(words, training=training), self._cache, self._work)

    def _words_of(self, pool: Dataset) -> dict[str, str]:
        """Return the words of labels for classification without data.label_names: each label is its own word."""
        if not self._format.has_labels:
            return {}
        words = {value: value for value in _in_order(pool.unique("answer"))}
        if len(words) < 2:
            raise DataError(
                f"all examples have the one label {next(iter(words))!r}",
                where=f"column {self._data.label_column!r} of data.train",
                fix="set data.label_column, or data.label_names",
            )
        return words

    def _cut_documents(self, examples: Dataset, scratch: Scratch, cut: Callable[[Batch], Batch]) -> Dataset:
        if not self._format.documents or not any(examples.unique("document")):
            return examples
        return scratch.encode(examples, cut, PIECES, "cutting documents")

    def _partition(self, examples: Dataset) -> list[Indices]:
        clients, seed = self._config.cluster.clients, self.seed(Draw.PARTITION)
        if self._data.partition == "iid":
            return iid(len(examples), clients, seed)
        groups = _codes(column(examples, "group"))
        if self._data.partition == "key":
            return by_key(groups, clients)
        return dirichlet(groups, clients, self._data.alpha, seed, minimum=2 if self._data.client_holdout > 0 else 1)


def label_words(data: DataConfig) -> dict[str, str]:
    """Return the answer word of each label that the configuration names. Raises ConfigError for a label with two
    words."""
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


def _unused(examples: Dataset) -> set[str]:
    return {name for names in filter(None, examples.unique("unused")) for name in json.loads(names)}


def _codes(groups: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """Return a number for each value, in the order of the values: lists of texts would take ten times the memory."""
    places = pc.index_in(groups, value_set=pa.array(sorted(groups.unique().to_pylist())))
    codes: npt.NDArray[np.int64] = places.to_numpy().astype(np.int64)
    return codes


def _in_order(labels: Sequence[str]) -> list[str]:
    """Sort labels: numbers by size if all are numbers, else as text."""
    try:
        return sorted(labels, key=float)
    except ValueError:
        return sorted(labels)

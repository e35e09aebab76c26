"""What there is to be told of the clients' data, from the same preparation that a run begins with."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from deca_ds.config import Config
from deca_ds.data import ClientData, read_client_data, validate_data_config
from deca_ds.data.cache import Cache
from deca_ds.data.checks import own_sources, tell_files
from deca_ds.data.encoding import IGNORED
from deca_ds.data.formats import FORMATS
from deca_ds.data.prepare import COMMON, OWN, TRAIN, Preparation
from deca_ds.data.rows import Work, column
from deca_ds.errors import DataError
from deca_ds.tools.data.repeats import Contents, Repeats, contents, repeats


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of a sequence as text. trained: whether they carry the loss."""

    text: str
    trained: bool


@dataclass(frozen=True)
class Shown:
    """One sequence, as the model gets it. number: in the client's table."""

    number: int
    tokens: int
    targets: int
    pieces: list[Piece]


@dataclass(frozen=True)
class Client:
    """What one client has. labels: of each set, how many examples have which label, by the label's word; empty where
    the format has no labels."""

    number: int
    data: ClientData
    labels: dict[str, Counter[str]]
    shown: list[Shown]


@dataclass(frozen=True)
class Found:
    """Everything. sample: rows read of each file, or None for all. files: which are read and which are left out, a line
    each. elsewhere: clients whose files this machine does not have -> why."""

    config: Config
    sample: int | None
    files: list[str]
    clients: list[Client]
    elsewhere: dict[int, str]
    repeats: Repeats


def look(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    scratch: Path,
    client: int | None = None,
    sample: int | None = None,
    shown: int = 2,
) -> Found:
    """Prepare and describe the data of `client`, or of all clients whose files are here. scratch: an empty folder.

    A sample leaves nothing in the cache; else what is prepared stays there, as after any start of the run. Raises
    DataError and ConfigError as the run would, and where this machine has no client's files.
    """
    validate_data_config(config)
    numbers, elsewhere = _here(config, client)
    work = Work.here(shown=True)
    clients: list[Client] = []
    texts: dict[int, dict[str, Contents]] = {}
    with closing(Cache(config.data.cache if sample is None else str(scratch / "cache"))) as cache:
        for number in numbers:
            preparation = Preparation(config, tokenizer, number, cache, work, sample)
            entry = preparation.entry()
            own = scratch / str(number)
            own.mkdir()
            of = preparation.examples(own)
            sets = {TRAIN: of.train, OWN: of.own, COMMON: of.common}
            labels = {
                name: _labels(rows, of.words) for name, rows in sets.items() if FORMATS[config.data.format].has_labels
            }
            texts[number] = {name: contents(rows) for name, rows in sets.items()}
            data = read_client_data(entry.folder)
            clients.append(Client(number, data, labels, _some(data.train, tokenizer, shown)))
    files = tell_files(config.data)
    if config.data.per_client:
        files += [line for number in numbers for line in tell_files(config.data, number)]
    return Found(config, sample, files, clients, elsewhere, repeats(texts))


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], labels: Sequence[int]) -> list[Piece]:
    """Return the text of a sequence, in runs of tokens that carry the loss and of others. The first token never
    does."""
    trained = [place > 0 and label != IGNORED for place, label in enumerate(labels)]
    made, before, end = [], "", 0
    for is_trained, run in groupby(trained):
        first, end = end, end + len(list(run))
        after = _decode(tokenizer, ids[:end])  # some tokenizers write a token otherwise where a text begins
        text = after[len(before) :] if after.startswith(before) else _decode(tokenizer, ids[first:end])
        made.append(Piece(text, is_trained))
        before = after
    return made


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _here(config: Config, client: int | None) -> tuple[list[int], dict[int, str]]:
    """Return the clients to look at, and why others are left out whose private files this machine does not have."""
    if client is not None:
        return [client], {}
    everybody = range(config.cluster.clients)
    if not config.data.per_client:
        return list(everybody), {}
    elsewhere: dict[int, str] = {}
    first: DataError | None = None
    for number in everybody:
        try:
            sources = own_sources(config.data, "per_client", number)
            sources += own_sources(config.data, "per_client_evaluation", number)
            closed = [source for source in sources if not os.access(str(source), os.R_OK)]
            if closed:
                raise DataError(
                    f"no permission to read {str(closed[0])!r}",
                    where=f"data.per_client[{number}]",
                    fix="look at it as the client's own user, or change its permissions",
                )
        except DataError as error:
            elsewhere[number] = error.what
            first = first or error
    if first is not None and len(elsewhere) == len(everybody):
        raise first
    return [number for number in everybody if number not in elsewhere], elsewhere


def _labels(examples: Dataset, words: Mapping[str, str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    if len(examples):
        for one in pc.value_counts(column(examples, "answer")).to_pylist():
            counts[words[one["values"]]] += one["counts"]
    return counts


def _some(train: Dataset, tokenizer: PreTrainedTokenizerBase, count: int) -> list[Shown]:
    """Return `count` sequences at equal distances, or all if there are fewer."""
    numbers = sorted({int(place) for place in np.linspace(0, len(train) - 1, min(count, len(train)))})
    found = []
    for number in numbers:
        row = train[number]
        made = pieces(tokenizer, row["input_ids"], row["labels"])
        targets = sum(label != IGNORED for label in row["labels"][1:])
        found.append(Shown(number, len(row["input_ids"]), targets, made))
    return found

"""One client's data, as it trains on them and is scored on them: made once, then memory-mapped by all of its ranks."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from deca_ds.config import Config
from deca_ds.data.cache import Cache, Entry
from deca_ds.data.prepare import COMMON, OWN, TRAIN, Preparation
from deca_ds.data.rows import Work


@dataclass(frozen=True)
class ClientData:
    """What one client trains on and is scored on.

    train: input_ids and labels (-100 where there is no loss), a sequence a row. own_evaluation, common_evaluation: the
    same columns, for classification a row for each example and answer word with the columns example, candidate and
    label. label_names: classification's answer words in the order of label and candidate. answers: whether the loss is
    on answers alone, and not on prompts or running text. summary: counts, for JSON.
    lengths: [tokens of a training example before it is cut, how many examples have so many], ascending. content: the
    same where all of these are. notes: what the user should know of the files; they may name what only this client may
    see.
    """

    train: Dataset
    own_evaluation: Dataset | None
    common_evaluation: Dataset | None
    label_names: list[str]
    answers: bool
    summary: dict[str, Any]
    lengths: list[list[int]]
    content: str
    notes: list[str] = field(default_factory=list)


def prepare_client_data(
    config: Config, tokenizer: PreTrainedTokenizerBase, client: int, cache: Cache, work: Work
) -> Path:
    """Read, partition, hold out and tokenise what client `client` needs, unless the cache has it already.

    Returns the folder for `read_client_data`, which any process of this host may call. Of private files (per_client)
    only this client's are opened. Raises ConfigError and DataError, see the modules.
    """
    return Preparation(config, tokenizer, client, cache, work).entry().folder


def read_client_data(folder: Path) -> ClientData:
    """Read what `prepare_client_data` has made, memory-mapped."""
    entry = Entry.read(folder)
    tables = [entry.table(name) for name in (TRAIN, OWN, COMMON)]
    train, own, common = (table and table.select_columns(_columns(table)) for table in tables)
    assert train is not None
    return ClientData(train, own, common, **entry.about)


def _columns(table: Dataset) -> list[str]:
    return [name for name in table.column_names if name not in ("targets", "length")]


def load_client_data(
    config: Config, tokenizer: PreTrainedTokenizerBase, client: int, *, work: Work | None = None
) -> ClientData:
    """Prepare and read a client's data, in this process alone."""
    with closing(Cache(config.data.cache)) as cache:
        return read_client_data(prepare_client_data(config, tokenizer, client, cache, work or Work()))


def load_all(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[ClientData]:
    """Prepare and read every client's data, in this process, with all cores that it may use and a bar on its
    terminal."""
    work = Work.here(shown=True)
    with closing(Cache(config.data.cache)) as cache:
        folders = [
            prepare_client_data(config, tokenizer, client, cache, work) for client in range(config.cluster.clients)
        ]
        return [read_client_data(folder) for folder in folders]

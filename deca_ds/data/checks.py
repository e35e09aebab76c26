"""What can be told from the configuration and the file names alone, before any process group or tokenizer exists."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path

from deca_ds.config import Config
from deca_ds.config.checks import check_names, check_ranges
from deca_ds.config.data import DataConfig
from deca_ds.config.paths import check_writable
from deca_ds.data.files import DOCUMENT, TABLES, Found, kind_of, some
from deca_ds.data.formats import FORMATS, Format
from deca_ds.data.sources import HubName, Source, check_on_hub, find_sources, look_through
from deca_ds.errors import ConfigError

NAMES: dict[str, Collection[str]] = {"data.format": FORMATS}  # of keys that name something in a registry


def validate_data_config(config: Config, client: int | None = None) -> None:
    """Refuse a data section that cannot work, paths without files, and names that the hub does not have.

    client: whose per_client paths must exist here; None checks none of them. Other clients' paths are never looked at.
    Raises ConfigError naming the key, DataError naming the path.
    """
    data = config.data
    if data.cache is not None and not os.path.isdir(data.cache):  # one that is there may have all that is needed
        check_writable(Path(data.cache), "data.cache")
    check_ranges(config)
    check_names(config, NAMES)
    format = FORMATS[data.format]
    _check_where_data_comes_from(data, config.cluster.clients, format)
    _check_partition(data, format)
    format.check(data)
    sources = find_sources(data.train, "data.train") + find_sources(data.evaluation, "data.evaluation")
    if client is not None:
        for key in ("per_client", "per_client_evaluation"):
            sources += own_sources(data, key, client)
    _check_columns(data, format, sources)
    check_on_hub(sources)


def tell_files(data: DataConfig, client: int | None = None) -> list[str]:
    """Tell which files are read and which are left out, a line a key: of the common data, or of `client`'s own. And
    which are scored on though they are trained on."""
    lists = {"train": data.train, "evaluation": data.evaluation}
    if client is not None:
        private = {"per_client": data.per_client, "per_client_evaluation": data.per_client_evaluation}
        lists = {f"{key}[{client}]": [entries[client]] for key, entries in private.items() if entries}
    told: list[str] = []
    trained: Found | None = None
    for key, entries in lists.items():
        sources, found = look_through(entries, f"data.{key}", hub=client is None)
        names = [f"{source.name} of the hub" for source in sources if isinstance(source, HubName)]
        if found.files or found.left_out:
            names.append(str(found))
        if names:
            told.append(f"data.{key}: {', '.join(names)}")
        trained = trained or found
        if trained is not found and (both := found.also_in(trained)):
            told.append(f"WARNING: data.{key} scores on what is trained on: {some(both)}")
    return told


def own_sources(data: DataConfig, key: str, client: int) -> list[Source]:
    """Return client `client`'s files in the list `key` (per_client or per_client_evaluation); [] if the list is
    empty."""
    entries = getattr(data, key)
    return find_sources([entries[client]], f"data.{key}[{client}], of client {client}", hub=False) if entries else []


def _check_where_data_comes_from(data: DataConfig, clients: int, format: Format) -> None:
    if bool(data.train) == bool(data.per_client):
        raise ConfigError(
            "both data.train and data.per_client are given" if data.train else "no training data",
            where="data.train, data.per_client",
            fix="set data.train (shared out among the clients) or data.per_client (a place for each), not both",
        )
    for key in ("per_client", "per_client_evaluation"):
        entries = getattr(data, key)
        if entries and len(entries) != clients:
            raise ConfigError(
                f"data.{key} has {len(entries)} entries for {clients} clients",
                where=f"data.{key}",
                fix=f"list {clients} paths, client i's at place i, or set cluster.clients={len(entries)}",
            )
    if data.per_client_evaluation and not data.per_client:
        raise ConfigError(
            "data.per_client_evaluation without data.per_client",
            where="data.per_client_evaluation",
            fix="with data.train, set data.client_holdout or data.evaluation instead",
        )
    if data.common_holdout > 0 and (data.per_client or data.evaluation):
        reason = "is taken out of data.train" if data.per_client else "and data.evaluation both name the common set"
        raise ConfigError(
            f"data.common_holdout = {data.common_holdout} {reason}", where="data.common_holdout", fix="set it to 0"
        )
    if data.per_client and format.has_labels and not data.label_names:
        raise ConfigError(
            "private files may hold different labels, and the clients must agree on them without exchanging data",
            where="data.label_names",
            fix="list every label value of all clients with its answer word",
        )


def _check_partition(data: DataConfig, format: Format) -> None:
    if data.per_client and data.partition_column:
        raise ConfigError(
            f"data.partition_column = {data.partition_column!r} with data.per_client: nothing is shared out, and the "
            "column's values would be counted in the table that all clients see",
            where="data.partition_column",
            fix="leave it out",
        )
    if data.partition == "iid":
        return
    if data.per_client:
        raise ConfigError(
            f"data.partition = {data.partition!r} with data.per_client, which is a partition already",
            where="data.partition",
            fix="leave it out",
        )
    if data.partition_column is None and not format.has_labels:
        raise ConfigError(
            f"data.partition = {data.partition!r} needs a column to skew by",
            where="data.partition_column",
            fix="name a column of data.train, or set data.partition=iid",
        )


def _check_columns(data: DataConfig, format: Format, sources: Sequence[Source]) -> None:
    kinds = {kind_of(source) for source in sources if isinstance(source, Path)}
    if DOCUMENT in kinds and not format.documents:
        readers = ", ".join(name for name, other in FORMATS.items() if other.documents)
        raise ConfigError(
            f"a .txt file has no columns for data.format = {data.format!r}",
            where="data.format",
            fix=f"set data.format={readers}, or give JSON, CSV, TSV or Parquet files",
        )
    if kinds.intersection(TABLES) and not format.tables:
        raise ConfigError(
            f"a table has no lists or objects, which data.format = {data.format!r} needs",
            where="data.format",
            fix="give JSON or Parquet files",
        )
    if not data.column_names:
        return
    if len(set(data.column_names)) < len(data.column_names):
        raise ConfigError("a name stands twice", where="data.column_names", fix="give every column its own name")
    wanted = [*format.columns(data)] + ([data.partition_column] if data.partition_column else [])
    missing = [name for name in wanted if name not in data.column_names]
    if missing and kinds and kinds <= set(TABLES):
        raise ConfigError(
            f"data.column_names = {list(data.column_names)} lacks {', '.join(missing)}",
            where="data.column_names",
            fix="name that column, or name others in data.text_columns, data.label_column or data.partition_column",
        )

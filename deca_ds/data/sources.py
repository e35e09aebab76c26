"""Where rows come from: files, folders, globs and hub names, read row by row with the place of every row.

A row that cannot be read is an error that names the file and the line. Nothing here knows what a row means.
"""

from __future__ import annotations

import csv
import glob
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, load_dataset

from deca_ds.errors import DataError

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")
TABLES = (".csv", ".tsv")  # the kinds that data.column_names applies to
_LOOKS_LIKE_A_PATH = re.compile(r"^[./~]|[*?\[\\]|/.*/|\.[A-Za-z]\w*$")


@dataclass(frozen=True)
class HubName:
    """A data set of the Hugging Face hub, as `name` or `name:split`."""

    name: str
    split: str | None = None


Source = Path | HubName


def find_sources(entries: Iterable[str], key: str, *, hub: bool = True) -> list[Source]:
    """The files and hub names that `entries` of the configuration key `key` stand for, in a fixed order, each once.

    An entry is a file, a folder (all data files below it), a glob, or, if `hub`, the name of a hub data set.
    Raises DataError for an entry without files or a file of an unknown kind.
    """
    sources: dict[Source, None] = {}
    for entry in entries:
        path = Path(entry).expanduser()
        if path.is_dir():
            found = _data_files_below(path)
            if not found:
                raise DataError(f"no data files in the folder {entry!r}", where=key, fix=_known_kinds())
        elif path.exists():
            found = [path]
        elif glob.has_magic(entry):
            matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
            found = [file for match in matches for file in (_data_files_below(match) if match.is_dir() else [match])]
            if not found:
                raise DataError(f"no file matches {entry!r}", where=key, fix=f"check the pattern, from {Path.cwd()}")
        elif hub and entry and not _LOOKS_LIKE_A_PATH.search(entry):
            name, _, split = entry.partition(":")
            sources[HubName(name, split or None)] = None
            continue
        else:
            raise DataError(f"no such file or folder: {entry!r}", where=key, fix=f"check the path, from {Path.cwd()}")
        for file in found:
            if file.suffix.lower() not in SUFFIXES:
                raise DataError(f"unknown kind of data file {str(file)!r}", where=key, fix=_known_kinds())
            sources[file] = None
    return list(sources)


def read_rows(path: Path, column_names: Iterable[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) for each row of a data file; a place reads "FILE, line 7" or "FILE, row 7", counted from 1.

    column_names: names for the columns of a CSV or TSV file without a header. Strings in a JSON list are rows with the
    one column `text`; so is a whole .txt file. Raises DataError with file and line for anything malformed.
    """
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            yield from _read_parquet(path)
        elif suffix in TABLES:
            yield from _read_table(path, list(column_names))
        elif suffix == ".txt":
            yield str(path), {"text": path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")}
        elif suffix == ".jsonl":
            yield from _read_json_lines(path)
        else:
            yield from _read_json(path)
    except UnicodeDecodeError as error:
        raise DataError("not UTF-8 text", where=_undecodable_line(path), fix="save the file as UTF-8") from error
    except OSError as error:
        raise DataError(f"cannot read the file: {error.strerror or error}", where=str(path)) from error


def load_hub(name: HubName, subset: str | None, split: str) -> Dataset:
    """A hub data set through the `datasets` library and its cache. Raises DataError if that fails, for any reason."""
    split = name.split or split
    try:
        return load_dataset(name.name, subset, split=split)
    except Exception as error:  # the hub client raises its own, the HTTP library's and the builder's errors alike
        reason = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
        raise DataError(
            f"cannot load {name.name!r} from the Hugging Face hub: {type(error).__name__}: {reason}",
            where=f"data.train or data.evaluation (subset {subset}, split {split})",
            fix="check the name, data.subset, data.split and the network, or give the path of a local file",
        ) from error


def _read_json(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    content = path.read_bytes()
    if not content.strip():
        return
    try:
        read = _parse_json(content.decode("utf-8-sig"), str(path))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON lines are often named .json
            yield from _read_json_lines(path)
            return
        raise DataError(f"not valid JSON: {error.msg}", where=f"{path}, line {error.lineno}") from error
    if isinstance(read, dict):
        read = read["data"] if isinstance(read.get("data"), list) else [read]
    if not isinstance(read, list):
        raise DataError(
            f"the file holds a {type(read).__name__}", where=str(path), fix='write a list of rows, or {"data": [...]}'
        )
    for number, row in enumerate(read, 1):
        yield _json_row(row, f"{path}, row {number}")


def _read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            place = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                row = _parse_json(line.decode("utf-8-sig"), place)
            except json.JSONDecodeError as error:
                raise DataError(f"not valid JSON: {error.msg}", where=f"{place}, column {error.colno}") from error
            yield _json_row(row, place)


def _parse_json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise  # the caller knows how to count lines
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise DataError(f"JSON that cannot be read: {error}", where=place) from error


def _json_row(row: Any, place: str) -> tuple[str, dict[str, Any]]:
    if isinstance(row, str):
        row = {"text": row}
    if not isinstance(row, dict):
        raise DataError(f"a row is a {type(row).__name__}", where=place, fix="make it an object with named columns")
    return place, row


def _read_table(path: Path, names: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(sys.maxsize)  # the default refuses texts above 128 KiB
    # text/tab-separated-values knows no quotes, and texts in it often hold single ones
    tabs = path.suffix.lower() == ".tsv"
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(
            file, delimiter="\t" if tabs else ",", quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL, strict=True
        )
        while True:
            place = f"{path}, line {reader.line_num + 1}"
            try:
                values = next(reader, None)
            except csv.Error as error:
                raise DataError(
                    f"malformed row: {error}", where=place, fix="check the quotes of the row that starts there"
                ) from error
            if values is None:
                return
            if not values:
                continue
            if not names:
                names = values
                if len(set(names)) < len(names):
                    raise DataError(
                        f"the header names a column twice: {names}",
                        where=place,
                        fix="rename one, or set data.column_names if the file has no header",
                    )
                continue
            if len(values) != len(names):
                raise DataError(
                    f"a row of {len(values)} columns instead of {len(names)} ({', '.join(names)})",
                    where=place,
                    fix="repair the row; for a file without a header set data.column_names",
                )
            yield place, dict(zip(names, values, strict=True))


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except pa.ArrowException as error:
        raise DataError(f"not a readable Parquet file: {error}", where=str(path)) from error


def _undecodable_line(path: Path) -> str:
    try:
        path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        return f"{path}, line {line}"
    return str(path)


def _data_files_below(folder: Path) -> list[Path]:
    files = sorted(folder.rglob("*"))
    hidden = [any(part.startswith(".") for part in file.relative_to(folder).parts) for file in files]
    return [
        file
        for file, skip in zip(files, hidden, strict=True)
        if not skip and file.is_file() and file.suffix.lower() in SUFFIXES
    ]


def _known_kinds() -> str:
    return f"data files end in {', '.join(SUFFIXES)}"

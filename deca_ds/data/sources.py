"""Where rows come from: files, folders, globs and hub names, read row by row with the place of every row.

A row that cannot be read is an error that names the file and the line. Nothing here knows what a row means.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import glob
import gzip
import io
import json
import lzma
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, load_dataset

from deca_ds.config.hub import hub_fix, why_not_on_hub, why_not_whole
from deca_ds.config.paths import could_be_hub_name, look_for
from deca_ds.data.files import LINES, TABLES, Found, add_file, add_matches, kind_of
from deca_ds.data.strict_json import Reader, parse
from deca_ds.errors import DataError, in_words

LOOKS_LIKE_A_PATH = re.compile(r"^[./~$]|[*?\[\\]|/.*/|/$|\.[A-Za-z]\w*$")
PART = 2**20  # bytes
_POINTER = b"version https://git-lfs.github.com/spec/"
_DAMAGED = (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile)


@dataclass(frozen=True)
class HubName:
    """A data set of the Hugging Face hub, as `name` or `name:split`."""

    name: str
    split: str | None = None


Source = Path | HubName


def find_sources(entries: Iterable[str], key: str, *, hub: bool = True) -> list[Source]:
    """Return the files and hub names that `entries` of the configuration key `key` stand for, in a fixed order, each
    once.

    An entry is a file, a folder (all data files below it), a glob, or, if `hub`, the name of a hub data set. What is
    there as a file or folder is no hub name. Raises DataError for an entry without files or a file of an unknown kind.
    """
    return look_through(entries, key, hub=hub)[0]


def look_through(entries: Iterable[str], key: str, *, hub: bool = True) -> tuple[list[Source], Found]:
    """Return what `find_sources` does, and the files by themselves with those that were left out. Raises DataError."""
    found, sources = Found(), dict[Source, None]()
    for entry in entries:
        path = Path(entry)
        if not entry.strip():
            raise DataError("an empty path", where=key, fix="name a file, a folder, a glob or a hub data set")
        if os.path.isdir(entry):  # these, not Path's, take names that are too long
            add_matches(found, [path], entry, key)
        elif os.path.exists(entry):
            add_file(found, path, key)
        elif glob.has_magic(entry):
            matches = sorted(glob.glob(entry, recursive=True))
            if not matches:
                raise DataError(f"no file matches {entry!r}", where=key, fix=look_for(entry), of_host=True)
            add_matches(found, map(Path, matches), entry, key)
        elif hub and (named := _hub_name(entry)) is not None:
            sources[named] = None
        else:
            raise DataError(f"no such file or folder: {entry!r}", where=key, fix=look_for(entry), of_host=True)
        sources |= dict.fromkeys(found.files)
    return list(sources), found


def _hub_name(entry: str) -> HubName | None:
    """Return `entry` as the name of a hub data set; None if it looks like a path, or cannot be such a name."""
    name, _, split = entry.partition(":")
    if os.path.islink(entry) or LOOKS_LIKE_A_PATH.search(entry) or not could_be_hub_name(name):
        return None
    return HubName(name, split or None)


def read_rows(path: Path, column_names: Iterable[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) for each row of a data file; a place reads "FILE, line 7" or "FILE, row 7", counted from 1.

    column_names: names for the columns of a CSV or TSV file without a header. Strings in a JSON list are rows with the
    one column `text`; so is a whole .txt file. Raises DataError with file and line for anything malformed.
    """
    kind = kind_of(path)
    try:
        _refuse_pointer(path)
        if kind in (".parquet", ".arrow"):
            yield from _read_batches(path)
        elif kind in TABLES:
            yield from _read_table(path, list(column_names))
        elif kind == ".txt":
            yield str(path), {"text": _content(path).decode("utf-8-sig").replace("\r\n", "\n")}
        elif kind in LINES:
            yield from _read_json_lines(path)
        else:
            yield from _read_json(path)
    except UnicodeDecodeError as error:
        raise DataError("not UTF-8 text", where=undecodable_line(path), fix="save the file as UTF-8") from error
    except _DAMAGED as error:
        raise DataError(f"a damaged compressed file: {error}", where=str(path), fix="copy or make it again") from error
    except OSError as error:
        raise unreadable(error, path) from error


def unreadable(error: OSError, path: Path) -> DataError:
    """Make the error for a file that the system does not let this process read."""
    fix = "look at its permissions, and whether its disk is there"
    return DataError(f"cannot read the file: {in_words(error)}", where=str(path), fix=fix)


def check_on_hub(sources: Iterable[Source]) -> None:
    """Raise DataError if the hub does not give one of those that are no paths."""
    for source in sources:
        if not isinstance(source, HubName):
            continue
        if (why := why_not_on_hub(source.name, "dataset")) is not None:
            raise DataError(
                f"there is no file or folder {source.name!r} in {Path.cwd()}, and {why}",
                where="data.train or data.evaluation",
                fix=f"{look_for(source.name)}; {hub_fix(source.name, 'dataset')}",
                of_host=True,
            )


def load_hub(name: HubName, subset: str | None, split: str) -> Dataset:
    """Load a hub data set through the `datasets` library and its cache. Raises DataError if that fails, for any
    reason."""
    split = name.split or split
    try:
        return load_dataset(name.name, subset, split=split)
    except Exception as error:  # the hub client raises its own, the HTTP library's and the builder's errors alike
        told = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
        why = why_not_whole("dataset") if isinstance(error, ConnectionError) else None
        raise DataError(
            f"there is no file or folder {name.name!r} in {Path.cwd()}, and it cannot be loaded from the Hugging Face "
            f"hub: {why or f'{type(error).__name__}: {told}'}",
            where=f"data.train or data.evaluation (subset {subset}, split {split})",
            fix=f"{look_for(name.name)}; check data.subset and data.split; {hub_fix(name.name, 'dataset')}",
        ) from error


def _refuse_pointer(path: Path) -> None:
    """Raise DataError for a pointer that Git LFS puts in the place of a file that it has not fetched."""
    with open(path, "rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise DataError("the file is a pointer of Git LFS to the data", where=str(path), fix="run `git lfs pull`")


def _open(path: Path) -> BinaryIO:
    """Open a file; its bytes are decompressed as they are read."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        return cast(BinaryIO, io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")))
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return cast(BinaryIO, openers.get(suffix, open)(path, "rb"))


def _content(path: Path) -> bytes:
    with _open(path) as file:
        return file.read()


def _read_json(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="") as file:
        reader = Reader(file)
        if reader.peek() == "[":
            try:
                for place, row in _numbered(reader.items(), path):
                    yield _json_row(row, place)
            except json.JSONDecodeError as error:
                raise _not_json(error, path, error.lineno) from error
            return
    yield from (_read_json_lines if _has_json_lines(path) else _read_json_object)(path)


def _numbered(rows: Iterator[Any], path: Path) -> Iterator[tuple[str, Any]]:
    end = object()
    for number in count(1):
        place = f"{path}, row {number}"
        row = _parsed(partial(next, rows, end), place)
        if row is end:
            return
        yield place, row


def _has_json_lines(path: Path) -> bool:
    """Return whether the first line is JSON by itself, and others follow: JSON lines are often named .json."""
    with _open(path) as file:
        lines = filter(bytes.strip, file)
        first, second = next(lines, b""), next(lines, b"")
    try:
        _decoded(first)
    except json.JSONDecodeError:
        return False
    except (ValueError, RecursionError):  # of no use in either form: reading it as a line says which line it is
        return bool(second)
    return bool(second)


def _read_json_object(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    content = _content(path)
    if not content.strip():
        return
    try:
        read = _parsed(partial(_decoded, content), str(path))
    except json.JSONDecodeError as error:
        raise _not_json(error, path, error.lineno) from error
    if not isinstance(read, dict):
        raise DataError(
            f"the file holds a {type(read).__name__}", where=str(path), fix='write a list of rows, or {"data": [...]}'
        )
    for number, row in enumerate(read["data"] if isinstance(read.get("data"), list) else [read], 1):
        yield _json_row(row, f"{path}, row {number}")


def _read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with _open(path) as lines:
        for number, line in enumerate(lines, 1):
            place = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                row = _parsed(partial(_decoded, line.rstrip(b"\r\n")), place)
            except json.JSONDecodeError as error:
                raise _not_json(error, path, number) from error
            yield _json_row(row, place)


def _not_json(error: json.JSONDecodeError, path: Path, line: int) -> DataError:
    where = f"{path}, line {line}, column {error.colno}"
    return DataError(f"not valid JSON: {error.msg}", where=where, fix="repair it there; the mistake may be just before")


def _decoded(text: bytes) -> Any:
    return parse(text.decode("utf-8-sig"))


def _parsed(read: Callable[[], Any], place: str) -> Any:
    try:
        return read()
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise  # the caller knows how to count lines
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise DataError(f"JSON that cannot be read: {error}", where=place, fix="repair or remove it") from error


def _json_row(row: Any, place: str) -> tuple[str, dict[str, Any]]:
    if isinstance(row, str):
        row = {"text": row}
    if not isinstance(row, dict):
        raise DataError(f"a row is a {type(row).__name__}", where=place, fix="make it an object with named columns")
    return place, row


def _read_table(path: Path, names: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(sys.maxsize)  # the default refuses texts above 128 KiB
    # text/tab-separated-values knows no quotes, and texts in it often hold single ones
    tabs = kind_of(path) == ".tsv"
    with io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="") as file:
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
                _check_header(values, place)
                names = values
                continue
            _check_table_row(values, names, place)
            yield place, dict(zip(names, values, strict=True))


def _check_header(names: Sequence[str], place: str) -> None:
    if len(set(names)) < len(names):
        raise DataError(
            f"the header names a column twice: {names}",
            where=place,
            fix="rename one, or set data.column_names if the file has no header",
        )


def _check_table_row(values: Sequence[str], names: Sequence[str], place: str) -> None:
    if len(values) != len(names):
        raise DataError(
            f"a row of {len(values)} columns instead of {len(names)} ({', '.join(names)})",
            where=place,
            fix="repair the row; for a file without a header set data.column_names",
        )
    if values == names:
        raise DataError(
            f"the names of the columns stand in a row: {', '.join(names)}",
            where=place,
            fix="remove that line; set data.column_names only for files without a header",
        )


def _read_batches(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    try:
        for batch in _batches(path):
            batch.validate(full=True)  # Arrow trusts the offsets in a file of its own
            names = batch.schema.names
            if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
                raise DataError(f"two columns named {twice[0]!r}", where=str(path), fix="rename or remove one of them")
            nested = [column.name for column in batch.schema if pa.types.is_nested(column.type)]
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row | {name: _as_given(row[name]) for name in nested}
    except pa.ArrowException as error:
        kind = kind_of(path)[1:].capitalize()
        raise DataError(f"not a readable {kind} file: {error}", where=str(path), fix="copy or make it again") from error


def _as_given(value: Any) -> Any:
    """Return `value` without what Arrow adds to each object: the keys of all other rows' objects, with null."""
    if isinstance(value, dict):
        return {key: _as_given(item) for key, item in value.items() if item is not None}
    return [_as_given(item) for item in value] if isinstance(value, list) else value


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    if kind_of(path) == ".parquet":
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=1000)
        return
    with pa.memory_map(str(path)) as mapped:
        if mapped.read(6) == b"ARROW1":  # a file; the datasets library writes streams
            with pa.ipc.open_file(mapped) as reader:
                yield from map(reader.get_batch, range(reader.num_record_batches))
        else:
            mapped.seek(0)
            with pa.ipc.open_stream(mapped) as reader:
                yield from reader


def undecodable_line(path: Path) -> str:
    """Say where the first bytes are that are no UTF-8. Of a long line only a part is in memory at a time."""
    decoder, number = codecs.getincrementaldecoder("utf-8")(), 1
    with _open(path) as file:
        while True:
            part = file.read(PART)
            try:
                decoder.decode(part, final=not part)
            except UnicodeDecodeError as error:
                # `object` begins with what was left of the part before, in which no line ends
                number += error.object.count(b"\n", 0, error.start)
                return f"{path}, line {number}"
            if not part:
                return str(path)
            number += part.count(b"\n")

"""Which files below a folder, or of a glob, are data. The others are left out, each with a reason that is told.

The kind of a file is the end of its name, of what is compressed the one before: `rows.jsonl.gz` holds JSON lines.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from deca_ds.errors import DataError
from deca_ds.plural import first_few, several

LINES = (".jsonl", ".ndjson")
TABLES = (".csv", ".tsv")  # the kinds that data.column_names applies to
DOCUMENT = ".txt"
_TEXTS = (".json", *LINES, *TABLES, DOCUMENT)
SUFFIXES = (*_TEXTS, ".parquet", ".arrow")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")  # of texts; the others are compressed inside
KNOWN_KINDS = f"data files end in {', '.join(SUFFIXES)}; all but the last two also with {', '.join(COMPRESSIONS)}"
_DESCRIPTIONS = (
    "dataset_info.json",
    "dataset_infos.json",
    "state.json",
    "dataset_dict.json",
)  # of data sets, by datasets
_NO_DOCUMENTS = re.compile(
    r"(readme|licen[cs]es?|copying|copyright)([\W_].*)?|notice|authors|changelog|citation|contributing|requirements"
    r"|(md5|sha\d+|check)sums?",
    re.IGNORECASE,
)
_SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "valid": "validation",
    "validation": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "evaluation": "validation",
    "heldout": "validation",
    "holdout": "validation",
}  # what names of files and folders say of a data set's parts
_WORD_ENDS = re.compile(r"[\W\d_]+|(?<=[a-z])(?=[A-Z])")
_SHARD = re.compile(r"(|.*\D)(\d+)[-_]of[-_](\d+)(\D.*)")  # one of so many files of a data set
some = partial(first_few, most=8)  # names in a line


def kind_of(path: Path) -> str:
    """Return how the file is read: one of the ends of names above, in lower case; "" for no data file."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS:
        inner = Path(path.stem).suffix.lower()
        return inner if inner in _TEXTS else ""
    return suffix if suffix in SUFFIXES else ""


@dataclass
class Found:
    """files: data files, in order, each once. left_out: other files and folders, and why they are none."""

    files: dict[Path, None] = field(default_factory=dict)
    left_out: dict[Path, str] = field(default_factory=dict)
    _names: dict[tuple[int, int], Path] = field(default_factory=dict)  # by the system's number of the file

    def add(self, file: Path) -> None:
        """Add a file that holds data, unless it is there under another name."""
        state = file.stat()
        first = self._names.setdefault((state.st_dev, state.st_ino), file)
        if first == file:
            self.files[file] = None
        else:
            self.left_out[file] = f"the same file as {first}"

    def also_in(self, other: Found) -> list[Path]:
        """Return the files that `other` has too, under whatever name."""
        return [file for state, file in self._names.items() if state in other._names]

    def __str__(self) -> str:
        read = f"{several(len(self.files), 'file')}: {some(self.files)}" if self.files else "no file"
        if not self.left_out:
            return read
        return f"{read}; left out: {some(f'{path} ({why})' for path, why in self.left_out.items())}"


def add_file(found: Found, file: Path, key: str) -> None:
    """Add a file that the configuration names. Raises DataError for what cannot be data."""
    if not file.is_file():
        raise DataError(f"{str(file)!r} is no regular file", where=key, fix="save what it gives as a file")
    if not kind_of(file):
        raise DataError(f"unknown kind of data file {str(file)!r}", where=key, fix=KNOWN_KINDS)
    if not file.stat().st_size:
        raise DataError(f"no examples: {str(file)!r} is empty", where=key, fix="leave it out, or look how it was made")
    found.add(file)


def add_matches(found: Found, matches: Iterable[Path], entry: str, key: str) -> None:
    """Add the data files among `matches`, in order, and those below the folders among them.

    Raises DataError if there is none, and for what may be meant in two ways: a link that leads nowhere, texts without
    rows among files of rows, one file in two kinds, some of the files of a data set, several splits of a data set,
    saved ones or told by names such as train.jsonl and test.jsonl.
    """
    data: list[Path] = []
    for match in matches:
        # in a folder nobody has named the files, and some of another kind are usual; a glob names what it matches
        for file, why in _below(match, key) if match.is_dir() else [(match, "" if kind_of(match) else "unknown")]:
            why = why or _why_no_data(file, key)
            if why == "unknown":
                raise DataError(f"unknown kind of data file {str(file)!r}", where=key, fix=KNOWN_KINDS)
            if why:
                found.left_out[file] = why
            else:
                data.append(file)
    if not data:
        where = "in the folder" if Path(entry).is_dir() else "match"
        raise DataError(
            f"no data files {where} {entry!r}", where=key, fix=f"{KNOWN_KINDS}; {Found({}, found.left_out)}"
        )
    _check_one_meaning(data, entry, key)
    for file in data:
        found.add(file)


def _below(folder: Path, key: str) -> Iterator[tuple[Path, str]]:
    """Yield each file below `folder`, through links and each folder once, with why it is no data, or ""."""

    def unreadable(error: OSError) -> None:
        raise DataError(
            f"cannot read the folder {error.filename!r}: {error.strerror}", where=key, fix="look at its owner"
        )

    files: list[tuple[Path, str]] = []
    seen: set[tuple[int, int]] = set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=unreadable):
        here, state = Path(root), os.stat(root)
        if (state.st_dev, state.st_ino) in seen:
            folders.clear()
            files.append((here, "a folder that has been read"))
            continue
        seen.add((state.st_dev, state.st_ino))
        _refuse_splits(here, names, key)
        current = _current(here) if "state.json" in names else None
        files += [(here / name, "hidden") for name in folders if name.startswith(".")]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            file = here / name
            stale = current is not None and file.suffix == ".arrow" and name not in current
            known = "" if kind_of(file) or _leads_nowhere(file) else "another kind of file"
            files.append((file, "hidden" if name.startswith(".") else "not in state.json" if stale else known))
    yield from sorted(files)


def _why_no_data(file: Path, key: str) -> str:
    if file.name in _DESCRIPTIONS:
        return "describes a data set"
    if kind_of(file) == DOCUMENT and _NO_DOCUMENTS.fullmatch(file.name[: file.name.lower().index(DOCUMENT)]):
        return "goes along with data"
    if _leads_nowhere(file):  # to a folder, perhaps
        raise DataError(
            f"{str(file)!r} is a link to {os.readlink(file)!r}, which is not there",
            where=key,
            fix="mend the link, or remove it",
        )
    if not file.is_file():
        return "no regular file"
    return "" if file.stat().st_size else "empty"


def _leads_nowhere(file: Path) -> bool:
    return file.is_symlink() and not file.exists()


def _check_one_meaning(data: list[Path], entry: str, key: str) -> None:
    documents = [file for file in data if kind_of(file) == DOCUMENT]
    rows = [file for file in data if kind_of(file) != DOCUMENT]
    if documents and rows:
        raise DataError(
            f"{entry!r} holds files of rows ({some(rows)}) and whole texts ({some(documents)})",
            where=key,
            fix="name those that are meant, for example with a glob for each kind",
        )
    splits = _splits(data)
    if "train" in splits and len(splits) > 1:
        parts = "; ".join(f"{split}: {some(files)}" for split, files in splits.items())
        raise DataError(
            f"{entry!r} holds several parts of a data set ({parts})",
            where=key,
            fix=f"name those that are meant, for example {splits['train'][0]}, or a glob for each part",
        )
    plain: dict[Path, Path] = {}
    for file in data:
        name = file.with_suffix("") if file.suffix.lower() in COMPRESSIONS else file
        if (other := plain.setdefault(name.with_suffix(""), file)) != file:
            raise DataError(
                f"{str(other)!r} and {str(file)!r} look like one file, which would count twice",
                where=key,
                fix="remove one of them, or name those that are meant",
            )
    if Path(entry).is_dir():  # a glob may be meant to match some of them
        _check_shards(data, key)


def _check_shards(data: list[Path], key: str) -> None:
    """Refuse files that say that they are one of so many, such as rows-00001-of-00003.parquet, if some are absent."""
    found: dict[tuple[Path, str, str], dict[int, set[int]]] = {}
    for file in data:
        if said := _SHARD.fullmatch(file.name):
            counts = found.setdefault((file.parent, said[1], said[4]), {})
            counts.setdefault(int(said[3]), set()).add(int(said[2]))
    for (folder, begin, end), counts in found.items():
        count, numbers = next(iter(counts.items()))
        absent = next((number for number in range(0 not in numbers, count) if number not in numbers), None)
        if len(counts) > 1 or absent is not None:
            wrong = (
                f"are of {' and of '.join(map(str, counts))}" if len(counts) > 1 else f"lack number {absent} of {count}"
            )
            raise DataError(
                f"the files {folder / begin}*{end} {wrong}",
                where=key,
                fix="complete them, or name those that are meant, for example with a glob",
            )


def _splits(data: list[Path]) -> dict[str, list[Path]]:
    """Map parts of a data set to the files that belong to them by their names, or by the folders below their common
    one."""
    root = os.path.commonpath([file.parent for file in data])
    found: dict[str, list[Path]] = {}
    for file in data:
        words = [word.lower().removesuffix("set") for word in _WORD_ENDS.split(os.path.relpath(file, root))]
        split = next((_SPLITS[word] for word in words if word in _SPLITS), None)
        if split is not None:
            found.setdefault(split, []).append(file)
    return found


def _refuse_splits(folder: Path, names: list[str], key: str) -> None:
    if "dataset_dict.json" in names:
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        raise DataError(
            f"{str(folder)!r} holds several data sets: {', '.join(splits)}",
            where=key,
            fix=f"name the one that is meant, for example {folder / (splits or ['train'])[0]}",
        )


def _current(folder: Path) -> set[str] | None:
    """Return the files of a data set that `datasets` has saved, beside which older ones may lie; None if `folder` holds
    none."""
    try:
        read = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return {str(file["filename"]) for file in read["_data_files"]}
    except (OSError, ValueError, LookupError, TypeError):
        return None

"""From rows to examples: each row checked and turned into an example by its format, see deca_ds/data/formats.

Beside its format's columns an example has "group", the value of the column that the partition skews by ("" where none
is named), "place", the file and line that it comes from, and "unused", the names of its row's fields that nothing is
done with, as a JSON list.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, Features

from deca_ds.data.cache import Cache
from deca_ds.data.code import code_of
from deca_ds.data.files import DOCUMENT, TABLES, kind_of
from deca_ds.data.formats import FORMATS, ExampleRules
from deca_ds.data.formats.fields import TEXT, check_fields, label_of
from deca_ds.data.rows import BATCH, Work, batches_of, write_rows
from deca_ds.data.sources import HubName, Source, load_hub, read_rows, unreadable
from deca_ds.errors import DataError, MissingValueError

_PLACES = 3  # of rows that are left out are named
_SHOWN = 40  # characters of a column's name: where a header is missing, these are texts
_EVERY_FORMAT = Features({"group": TEXT, "place": TEXT, "unused": TEXT})


@dataclass
class LeftOut:
    """The rows that data.incomplete leaves out. places: file and line of the first ones. count: of all."""

    places: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, places: Sequence[str], count: int) -> None:
        """Count more rows, of which the first are at these places."""
        self.places += places[: _PLACES - len(self.places)]
        self.count += count


class ReadExamples(NamedTuple):
    """examples: of all sources, in order, memory-mapped."""

    examples: Dataset
    left_out: LeftOut


def read_examples(
    sources: Sequence[Source], rules: ExampleRules, cache: Cache, work: Work | None = None
) -> ReadExamples:
    """Read examples from the cache, or anew where a file's content changed.

    Raises DataError naming file and line for a malformed row, a missing column, a wrong type or an unknown label, and
    for sources without any example.
    """
    names = [source if isinstance(source, HubName) else source.absolute() for source in sources]
    content = contents(sources, rules, cache)
    format = FORMATS[rules.format]
    parts = [code_of(format.example), asdict(rules), list(map(str, names)), content]  # names, because errors name files
    features = Features({**format.features, **_EVERY_FORMAT})

    def make(folder: Path) -> dict[str, Any]:
        left_out = LeftOut()
        with (work or Work()).bar("reading rows", None) as advance:

            def counted() -> Iterator[dict[str, Any]]:
                for number, example in enumerate(generate_examples(names, rules, left_out)):
                    if number % BATCH == 0:
                        advance(BATCH)
                    yield example

            write_rows(folder / "examples.arrow", features, batches_of(counted(), features))
        check_unchanged(content, sources, rules, cache)
        return {"left_out": asdict(left_out)}

    entry = cache.entry("examples", parts, make)
    examples = entry.table("examples")
    assert examples is not None
    return ReadExamples(examples, LeftOut(**entry.about["left_out"]))


def contents(sources: Iterable[Source], rules: ExampleRules, cache: Cache) -> list[str]:
    """Return what tells the content of each source, and how it is read, from any other's."""
    return [_content(source, rules, cache) for source in sources]


def check_unchanged(before: Sequence[str], sources: Sequence[Source], rules: ExampleRules, cache: Cache) -> None:
    """Raise DataError where the `contents` of sources are no longer those of before."""
    for source, old, new in zip(sources, before, contents(sources, rules, cache), strict=True):
        if old != new:
            raise DataError("it has changed while it was read", where=str(source), fix="start again when it is whole")


def generate_examples(sources: Sequence[Source], rules: ExampleRules, left_out: LeftOut) -> Iterator[dict[str, Any]]:
    """Yield the examples of `sources`, one after the other, and add the rows that are left out to `left_out`. Raises
    DataError as `read_examples` does."""
    empty, format = True, FORMATS[rules.format]
    named = (*format.columns(rules), *([rules.group_column] if rules.group_column else []))
    whole = replace(rules, text_columns=("text",))  # a text file has this one column
    rows: Iterator[tuple[str, dict[str, Any]]]
    for source in sources:
        if isinstance(source, HubName):
            loaded = load_hub(source, rules.subset, rules.split)
            rows = ((f"{source.name} on the hub, row {number}", row) for number, row in enumerate(loaded, 1))
        else:
            rows = read_rows(source, rules.column_names)
        document = not isinstance(source, HubName) and kind_of(source) == DOCUMENT
        for number, (place, row) in enumerate(islice(rows, rules.first)):
            if number == 0 and not document:
                _check_columns(row, named, source, rules, place)
            unused = check_fields(row, format.fields, place, named)
            try:
                example = format.example(row, whole if document else rules, place, unused)
                group = label_of(row, rules.group_column, place, rules.labels) if rules.group_column else ""
            except MissingValueError:
                if rules.incomplete == "refuse":
                    raise
                left_out.add([place], 1)
                continue
            if document:
                example["document"] = True
            empty = False
            yield {**example, "group": group, "place": place, "unused": json.dumps(sorted(unused)) if unused else ""}
    if empty:
        names = (source.name if isinstance(source, HubName) else str(source) for source in sources)
        what = (
            f"no examples{f': all {left_out.count} rows lack a value that the format needs' if left_out.count else ''}"
        )
        raise DataError(what, where=", ".join(names), fix="name files with at least one row")


def _check_columns(
    row: Mapping[str, Any], named: Sequence[str], source: Source, rules: ExampleRules, place: str
) -> None:
    """Raise DataError if a source's first row lacks a column: then the configuration does not fit the data."""
    if not (absent := [name for name in named if name not in row]):
        return
    format = FORMATS[rules.format]
    keys = [f"data.{key}" for key in format.keys if key.endswith(("_column", "_columns"))]
    if absent == [rules.group_column] and rules.group_column not in format.columns(rules):
        fix = "name one of them in data.partition_column, or leave that out with data.partition=iid"
    else:
        fix = f"name it in {' or '.join(keys)}, or choose" if keys else "rename the columns, or choose"
        fix += " the data.format that fits the file"
    if isinstance(source, Path) and kind_of(source) in TABLES and not rules.column_names:
        place, fix = str(source), f"if the file has no header, list its columns in data.column_names; else {fix}"
    there = ", ".join(str(name)[:_SHOWN] for name in row) or "none"
    raise DataError(f"no column {absent[0]!r}; there are: {there}", where=place, fix=fix)


def _content(source: Source, rules: ExampleRules, cache: Cache) -> str:
    if isinstance(source, HubName):
        return f"{source} {load_hub(source, rules.subset, rules.split)._fingerprint}"
    try:
        if rules.first is not None:  # to read a file's beginning is to be quick, so nothing reads all of it
            return f"{kind_of(source)} {source.stat().st_size} {source.stat().st_mtime_ns}"
        return f"{kind_of(source)} {source.suffix.lower()} {cache.content(source)}"
    except OSError as error:
        raise unreadable(error, source) from error

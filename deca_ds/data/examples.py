"""From rows to examples: each row checked and turned into an example by its format, see deca_ds/data/formats.

Beside its format's columns an example has "group", the value of the column that the partition skews by ("" where none
is named), "place", the file and line that it comes from, and "unused", the names of its row's fields that nothing is
done with, as a JSON list.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset, Features
from datasets.exceptions import DatasetGenerationError

from deca_ds.data.files import DOCUMENT, kind_of
from deca_ds.data.formats import FORMATS, ExampleRules
from deca_ds.data.formats.fields import TEXT, check_fields, label_of
from deca_ds.data.sources import HubName, Source, load_hub, read_rows
from deca_ds.errors import DataError

_CACHE_VERSION = 4  # raise it when a row's example changes: prepared examples are kept in the datasets cache
_EVERY_FORMAT = Features({"group": TEXT, "place": TEXT, "unused": TEXT})


def read_examples(sources: list[Source], rules: ExampleRules) -> Dataset:
    """The examples of all sources in order, memory-mapped from the datasets cache; read anew when a file changed.

    Raises DataError naming file and line for a malformed row, a missing column, a wrong type or an unknown label, and
    for sources without any example.
    """
    files = tuple(_identity(source, rules) for source in sources)
    try:
        examples = Dataset.from_generator(
            generate_examples,
            features=Features({**FORMATS[rules.format].features, **_EVERY_FORMAT}),
            gen_kwargs={"files": files, "rules": rules, "version": _CACHE_VERSION},
        )
    except DatasetGenerationError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, DataError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from None
    assert isinstance(examples, Dataset)
    return examples


def generate_examples(
    files: tuple[tuple[Any, ...], ...], rules: ExampleRules, version: int
) -> Iterator[dict[str, Any]]:
    """Examples of `files`, (source, its state) each; state and version only tell the cache what it may reuse."""
    empty, format = True, FORMATS[rules.format]
    named = (*format.columns(rules), *([rules.group_column] if rules.group_column else []))
    whole = replace(rules, text_columns=("text",))  # a text file has this one column
    for source, _ in files:
        if isinstance(source, HubName):
            loaded = load_hub(source, rules.subset, rules.split)
            rows = ((f"{source.name} on the hub, row {number}", row) for number, row in enumerate(loaded, 1))
        else:
            rows = read_rows(Path(source), rules.column_names)
        document = not isinstance(source, HubName) and kind_of(Path(source)) == DOCUMENT
        for place, row in rows:
            unused = check_fields(row, format.fields, place, named)
            example = format.example(row, whole if document else rules, place, unused)
            if document:
                example["document"] = True
            group = label_of(row, rules.group_column, place, rules.labels) if rules.group_column else ""
            empty = False
            yield {**example, "group": group, "place": place, "unused": json.dumps(sorted(unused)) if unused else ""}
    if empty:
        names = (source.name if isinstance(source, HubName) else source for source, _ in files)
        raise DataError("no examples", where=", ".join(names), fix="name files with at least one row")


def _identity(source: Source, rules: ExampleRules) -> tuple[Any, str]:
    if isinstance(source, HubName):
        return source, str(load_hub(source, rules.subset, rules.split)._fingerprint)
    state = source.stat()
    return str(source.absolute()), f"{state.st_size} bytes, {state.st_mtime_ns}"

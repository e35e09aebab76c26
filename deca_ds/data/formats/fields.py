"""What a format says about the fields of its rows, and how single values are read.

A missing value is null, NaN, or a text without a character that shows. It is missing wherever it comes from.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from datasets import Features, Value

from deca_ds.config.data import DataConfig
from deca_ds.data.formats.labels import normal_label
from deca_ds.errors import DataError, MissingValueError

TEXT = Value("string")
# the columns of examples, by which deca_ds/data/encoding.py tells what to do with them
TEXTS = Features({"text": TEXT, "document": Value("bool")})  # document: whether the text is a whole file
PAIRS = Features({"prompt": TEXT, "answer": TEXT})
CONVERSATIONS = Features({"conversation": TEXT})  # JSON text, see chat.py
_NO_LABEL = ("nan", "NaN", "NaT", "<NA>", "#N/A")  # what tables write for a missing value and nobody for a class
_UNSEEN = ("Cc", "Cf", "Zl", "Zp", "Zs")  # Unicode's categories of characters that show nothing
_EMPTY_TEXTS = ("[]", "{}", "null")  # as a table writes an empty list, an empty object and null


class Use(Enum):
    """What is done with a field."""

    RENDERED = "rendered"  # its content stands in the text
    OBEYED = "obeyed"  # it decides what is trained
    REFUSED = "refused"  # a row that has a value there stops the run
    # any other field is not used, and its name is told once


@dataclass(frozen=True)
class Field:
    """Fields that a format treats alike. note: for the table in docs/formats.md, and for errors."""

    names: tuple[str, ...]
    use: Use
    note: str = ""
    harmless: tuple[Any, ...] = ()  # values that a refused field may have


@dataclass(frozen=True)
class ExampleRules:
    """How rows become examples; the part of DataConfig that reading depends on. incomplete: data.incomplete. first:
    read so many rows of each source and no more; None reads all."""

    format: str
    text_columns: tuple[str, ...] = ("text",)
    label_column: str = "label"
    labels: tuple[str, ...] = ()  # the label values that are allowed; () allows any
    prompt: str = "{text}"
    group_column: str | None = None
    column_names: tuple[str, ...] = ()
    subset: str | None = None
    split: str = "train"
    incomplete: str = "refuse"
    first: int | None = None


@dataclass(frozen=True)
class Format:
    """One data format: what a row has to have, what is done with its fields, and how it becomes an example.

    sample: a row, for the manual and for tests. trained: what carries the loss, for the manual. fields: of a row.
    features: the examples' columns, TEXTS, PAIRS or CONVERSATIONS. example: (row, rules, place) -> an example; adds the
    names of fields that it did not use, and that `fields` do not tell of, to the set that it is given.
    columns: those that every row must have, by their names in the configuration. keys: of the section data, those that
    only formats which name them use; check: raises ConfigError for values of these that cannot work.
    tables: whether a row of CSV or TSV can be one. has_labels: an answer is a label, one of a few.
    turns, turn_fields: of a conversation, the column with its turns, and their fields.
    """

    name: str
    sample: Mapping[str, Any]
    trained: str
    fields: tuple[Field, ...]
    features: Features
    example: Callable[[Mapping[str, Any], ExampleRules, str, set[str]], dict[str, Any]]
    columns: Callable[[ExampleRules | DataConfig], Sequence[str]]
    keys: tuple[str, ...] = ()
    check: Callable[[DataConfig], None] = lambda data: None
    tables: bool = True
    has_labels: bool = False
    turns: str = ""
    turn_fields: tuple[Field, ...] = ()

    @property
    def documents(self) -> bool:
        """Whether a whole text file is an example."""
        return "document" in self.features


def check_fields(
    given: Mapping[str, Any], fields: tuple[Field, ...], place: str, named: tuple[str, ...] = ()
) -> set[str]:
    """Raise DataError for a value in a refused field; returns the names of fields with a value that nobody uses.

    named: columns that the configuration names; what the format thinks of them does not count.
    """
    known = {name: field for field in fields for name in field.names}
    unused = set()
    for name, value in given.items():
        if name in named or missing(value):
            continue
        field = known.get(name)
        if field is None:
            unused.add(str(name) or "a column without a name")
        elif field.use is Use.REFUSED and not _is_empty(value) and value not in field.harmless:
            raise DataError(
                f"the field {name!r} has a value: {_shown(value)}",
                where=place,
                fix=f"{field.note}; remove the field or the row",
            )
    return unused


def missing(value: Any) -> bool:
    """Return whether there is no value: null, NaN, or a text without a character that shows."""
    if isinstance(value, str):
        return all(unicodedata.category(char) in _UNSEEN for char in value)
    return value is None or (isinstance(value, float) and math.isnan(value))


def value_of(row: Mapping[str, Any], column: str, place: str) -> Any:
    """Return the value of a column. Raises DataError where the row has none."""
    if column not in row:
        raise DataError(
            f"no column {column!r}; there are: {', '.join(map(str, row)) or 'none'}",
            where=place,
            fix=_REPAIR,
        )
    return row[column]


def text_of(row: Mapping[str, Any], column: str, place: str, *, blank: bool = False) -> str:
    """Return the text of a column. Raises DataError for anything else, and unless `blank` MissingValueError for a
    missing one."""
    value = value_of(row, column, place)
    if missing(value) and not (blank and isinstance(value, str)):
        raise MissingValueError(
            f"column {column!r} is empty{_kind(value)}; columns: {', '.join(map(str, row))}", where=place, fix=LEAVE_OUT
        )
    if not isinstance(value, str):
        what = f"a {type(value).__name__}, not text"
        raise DataError(f"column {column!r} is {what}; columns: {', '.join(map(str, row))}", where=place, fix=_REPAIR)
    return encodable(value)


def label_of(row: Mapping[str, Any], column: str, place: str, known: tuple[str, ...]) -> str:
    """Return the label in a column, by the rule of `normal_label`. known: texts that are labels, whatever they look
    like.

    Raises MissingValueError if it is missing, DataError if it is infinite, or a list or object.
    """
    value = value_of(row, column, place)
    if missing(value) or (value in _NO_LABEL and value not in known):
        named = not missing(value)
        raise MissingValueError(
            f"column {column!r} is empty{_kind(value)}; columns: {', '.join(map(str, row))}",
            where=place,
            fix=f"{LEAVE_OUT}; a class of that name is listed in data.label_names" if named else LEAVE_OUT,
        )
    if not isinstance(value, str | int | float) or (isinstance(value, float) and math.isinf(value)):
        raise DataError(
            f"column {column!r} is {value if isinstance(value, float) else f'a {type(value).__name__}'}, no text or "
            f"number; columns: {', '.join(map(str, row))}",
            where=place,
            fix=_REPAIR,
        )
    return encodable(normal_label(value))


def encodable(text: str) -> str:
    """Return `text`, with lone surrogates (a JSON escape that was cut in half) replaced: they have no UTF-8
    encoding."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


_REPAIR = "repair or remove the row"
LEAVE_OUT = f"{_REPAIR}, or leave all such rows out: data.incomplete=leave_out"


def _kind(value: Any) -> str:
    if value is None:
        return " (null)"
    return f" ({value})" if isinstance(value, float) or value in _NO_LABEL else ""


def _is_empty(value: Any) -> bool:
    return (isinstance(value, list | dict) and not value) or (isinstance(value, str) and value.strip() in _EMPTY_TEXTS)


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)[:60]

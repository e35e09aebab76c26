"""From rows to examples: each format's columns, checked and brought into one of three shapes.

text and document examples       {"text", "document"}; a document (a .txt file) is later cut into many examples
prompt and answer examples       {"prompt", "answer"}; for classification the answer is the label's value
conversations                    {"messages": [{"role", "content"}, ...]}
Each also has "group", the value of the column that the partition skews by ("" where none is named).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError

from deca_ds.data.files import DOCUMENT, kind_of
from deca_ds.data.sources import HubName, Source, load_hub, read_rows
from deca_ds.errors import DataError

# Stanford Alpaca's prompts; the answer starts on a line of its own, so that no token straddles its beginning.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
ROLES = ("system", "user", "assistant", "tool")
_CACHE_VERSION = 1  # raise it when a row's example changes: prepared examples are kept in the datasets cache


@dataclass(frozen=True)
class ExampleRules:
    """How rows become examples; the part of DataConfig that reading depends on."""

    format: str
    text_columns: tuple[str, ...] = ("text",)
    label_column: str = "label"
    labels: tuple[str, ...] = ()  # the label values that are allowed; () allows any
    prompt: str = "{text}"
    group_column: str | None = None
    column_names: tuple[str, ...] = ()
    subset: str | None = None
    split: str = "train"

    @property
    def features(self) -> Features:
        """The columns of the examples."""
        text = Value("string")
        if self.format == "text":
            return Features({"text": text, "document": Value("bool"), "group": text})
        if self.format in ("messages", "sharegpt"):
            return Features({"messages": List({"role": text, "content": text}), "group": text})
        return Features({"prompt": text, "answer": text, "group": text})


def read_examples(sources: list[Source], rules: ExampleRules) -> Dataset:
    """The examples of all sources in order, memory-mapped from the datasets cache; read anew when a file changed.

    Raises DataError naming file and line for a malformed row, a missing column, a wrong type or an unknown label, and
    for sources without any example.
    """
    files = tuple(_identity(source, rules) for source in sources)
    try:
        examples = Dataset.from_generator(
            generate_examples,
            features=rules.features,
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
    empty = True
    for source, _ in files:
        if isinstance(source, HubName):
            loaded = load_hub(source, rules.subset, rules.split)
            rows = ((f"{source.name} on the hub, row {number}", row) for number, row in enumerate(loaded, 1))
        else:
            rows = read_rows(Path(source), rules.column_names)
        document = not isinstance(source, HubName) and kind_of(Path(source)) == DOCUMENT
        for place, row in rows:
            example = _example(row, rules, place, document)
            group = _scalar(row, rules.group_column, place) if rules.group_column else ""
            empty = False
            yield {**example, "group": group}
    if empty:
        names = (source.name if isinstance(source, HubName) else source for source, _ in files)
        raise DataError("no examples", where=", ".join(names), fix="name files with at least one row")


def _identity(source: Source, rules: ExampleRules) -> tuple[Any, str]:
    if isinstance(source, HubName):
        return source, str(load_hub(source, rules.subset, rules.split)._fingerprint)
    state = source.stat()
    return str(source.absolute()), f"{state.st_size} bytes, {state.st_mtime_ns}"


def _example(row: Mapping[str, Any], rules: ExampleRules, place: str, document: bool) -> dict[str, Any]:
    if rules.format == "text":
        return {"text": _text(row, "text", place) if document else _joined(row, rules, place), "document": document}
    if rules.format == "classification":
        label = _scalar(row, rules.label_column, place)
        if rules.labels and label not in rules.labels:
            raise DataError(
                f"unknown label {label!r}; the labels are {', '.join(rules.labels)}",
                where=place,
                fix="add it to data.label_names, or repair the row",
            )
        return {"prompt": rules.prompt.replace("{text}", _joined(row, rules, place)), "answer": label}
    if rules.format == "alpaca":
        instruction, output = _text(row, "instruction", place), _text(row, "output", place)
        given = _text(row, "input", place) if row.get("input") is not None else ""
        template = ALPACA_WITH_INPUT if given else ALPACA_WITHOUT_INPUT
        return {"prompt": template.format(instruction=instruction, input=given), "answer": output}
    return {"messages": _messages(row, rules.format, place)}


def _joined(row: Mapping[str, Any], rules: ExampleRules, place: str) -> str:
    return " ".join(_text(row, column, place) for column in rules.text_columns)


def _messages(row: Mapping[str, Any], format: str, place: str) -> list[dict[str, str]]:
    column, role_key, text_key = (
        ("messages", "role", "content") if format == "messages" else ("conversations", "from", "value")
    )
    turns = _value(row, column, place)
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(
            f"column {column!r} is no list of messages",
            where=place,
            fix=f'write [{{"{role_key}": ..., "{text_key}": ...}}]',
        )
    messages = []
    for number, turn in enumerate(turns, 1):
        at = f"{place}, message {number}"
        role = _text(turn, role_key, at)
        role = SHAREGPT_ROLES.get(role, role) if format == "sharegpt" else role
        if role not in ROLES:
            known = SHAREGPT_ROLES if format == "sharegpt" else ROLES
            raise DataError(f"unknown role {role!r}", where=at, fix=f"known roles: {', '.join(known)}")
        messages.append({"role": role, "content": _text(turn, text_key, at)})
    return messages


def _value(row: Mapping[str, Any], column: str, place: str) -> Any:
    if column not in row:
        raise DataError(
            f"no column {column!r}; there are: {', '.join(map(str, row)) or 'none'}",
            where=place,
            fix="name the columns in data.* or choose the data.format that fits the file",
        )
    return row[column]


def _text(row: Mapping[str, Any], column: str, place: str) -> str:
    value = _value(row, column, place)
    if not isinstance(value, str):
        kind = "empty (null)" if value is None else f"a {type(value).__name__}, not text"
        raise DataError(f"column {column!r} is {kind}; columns: {', '.join(row)}", where=place, fix="repair the row")
    return _encodable(value)


def _scalar(row: Mapping[str, Any], column: str, place: str) -> str:
    value = _value(row, column, place)
    if not isinstance(value, str | int | float):
        raise DataError(
            f"column {column!r} is {'empty (null)' if value is None else f'a {type(value).__name__}'}, "
            f"not a text or a number; columns: {', '.join(row)}",
            where=place,
            fix="repair the row",
        )
    return _encodable(str(value))


def _encodable(text: str) -> str:
    """`text`, with lone surrogates (a JSON escape that was cut in half) replaced: they have no UTF-8 encoding."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text

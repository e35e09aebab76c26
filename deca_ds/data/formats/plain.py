"""Formats without turns: text, classification, alpaca."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deca_ds.config.data import DataConfig
from deca_ds.data.formats.fields import (
    PAIRS,
    TEXTS,
    ExampleRules,
    Field,
    Format,
    Use,
    label_of,
    missing,
    text_of,
)
from deca_ds.data.formats.labels import normal_label
from deca_ds.errors import ConfigError, DataError

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
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
NO_MEDIA = Field(MEDIA, Use.REFUSED, "the model is trained on text alone")
PREFERENCES = Field(("chosen", "rejected", "rejected_response"), Use.REFUSED, "preferences are not learned from")
KTO = Field(
    ("label", "kto_tag"),
    Use.OBEYED,
    "`true`: trained; `false` (an unwanted answer), and 0 as a kto_tag: refused; anything else: not used",
)
ROW_WEIGHTS = Field(
    ("weight", "loss_weight", "sample_weight", "train", "trainable", "mask", "masked", "loss_mask"),
    Use.REFUSED,
    "single examples are neither weighted nor masked",
    harmless=(1,),  # true is equal to it
)


def joined(row: Mapping[str, Any], rules: ExampleRules, place: str) -> str:
    return " ".join(text_of(row, column, place) for column in rules.text_columns)


def refuse_unwanted(row: Mapping[str, Any], place: str, unused: set[str]) -> None:
    """Raise DataError if the row says of its answer that it is not wanted; a label that says neither is not used."""
    for name in KTO.names:
        value = row.get(name)
        if missing(value):
            continue
        said = normal_label(value).lower() if isinstance(value, str | int | float) else ""
        if name == "kto_tag":
            said = {"0": "false", "1": "true"}.get(said, said)
        if said not in ("true", "false"):
            unused.add(name)
        if said == "false":
            raise DataError(
                f"the field {name!r} is false: the answer is not wanted, and would be trained",
                where=place,
                fix="remove the rows with unwanted answers",
            )


def _text(row: Mapping[str, Any], rules: ExampleRules, place: str, unused: set[str]) -> dict[str, Any]:
    texts = [text_of(row, column, place, blank=True) for column in rules.text_columns]
    return {"text": " ".join(text for text in texts if not missing(text)), "document": False}


def _classification(row: Mapping[str, Any], rules: ExampleRules, place: str, unused: set[str]) -> dict[str, Any]:
    label = label_of(row, rules.label_column, place, rules.labels)
    if rules.labels and label not in rules.labels:
        raise DataError(
            f"unknown label {label!r}; the labels are {', '.join(rules.labels)}",
            where=place,
            fix="add it to data.label_names, or repair the row",
        )
    return {"prompt": rules.prompt.replace("{text}", joined(row, rules, place)), "answer": label}


def _alpaca(row: Mapping[str, Any], rules: ExampleRules, place: str, unused: set[str]) -> dict[str, Any]:
    instruction, output = text_of(row, "instruction", place), text_of(row, "output", place)
    given = "" if missing(row.get("input")) else text_of(row, "input", place)
    refuse_unwanted(row, place, unused)
    template = ALPACA_WITH_INPUT if given else ALPACA_WITHOUT_INPUT
    return {"prompt": template.format(instruction=instruction, input=given), "answer": output}


def _check_texts(data: DataConfig) -> None:
    if not data.text_columns:
        raise ConfigError("no text column", where="data.text_columns", fix="name at least one column")


def _check_labels(data: DataConfig) -> None:
    _check_texts(data)
    if "{text}" not in data.prompt:
        raise ConfigError(f"data.prompt = {data.prompt!r} has no {{text}}", where="data.prompt", fix="put {text} in")
    if not data.label_column:
        raise ConfigError("no label column", where="data.label_column", fix="name the column with the labels")
    if data.label_names and len(set(data.label_names.values())) < 2:
        raise ConfigError("fewer than two answer words", where="data.label_names", fix="name at least two labels")
    if not all(str(word).strip() for word in data.label_names.values()):
        raise ConfigError("an empty answer word", where="data.label_names", fix="give every label a word")


TEXT_FORMAT = Format(
    name="text",
    sample={"text": "The tide comes in."},
    trained="every token",
    fields=(
        Field(
            ("data.text_columns",),
            Use.RENDERED,
            "joined by a blank; a text file is one document, cut into sequences; blank ones are left out, and rows "
            "without another",
        ),
    ),
    columns=lambda rules: rules.text_columns,
    keys=("text_columns",),
    check=_check_texts,
    features=TEXTS,
    example=_text,
)
CLASSIFICATION = Format(
    name="classification",
    sample={"text": "The tide comes in.", "label": "sea"},
    trained="the label's word and the end token",
    fields=(
        Field(("data.text_columns",), Use.RENDERED, "joined by a blank, in the place of {text} in data.prompt"),
        Field(("data.label_column",), Use.RENDERED, "as its word in data.label_names, after a blank"),
    ),
    columns=lambda rules: (*rules.text_columns, rules.label_column),
    keys=("text_columns", "label_column", "label_names", "prompt"),
    check=_check_labels,
    has_labels=True,
    features=PAIRS,
    example=_classification,
)
ALPACA = Format(
    name="alpaca",
    sample={"instruction": "Add the numbers.", "input": "2 and 3", "output": "5"},
    trained="the output and the end token",
    fields=(
        Field(("instruction",), Use.RENDERED, "in Stanford Alpaca's prompt"),
        Field(("input",), Use.RENDERED, "in Stanford Alpaca's prompt, where there is one"),
        Field(("output",), Use.RENDERED, "the answer"),
        KTO,
        Field(
            ("system", "system_prompt", "history", "tools"),
            Use.REFUSED,
            "Alpaca's prompt has no place for it: use data.format=messages",
        ),
        PREFERENCES,
        NO_MEDIA,
        ROW_WEIGHTS,
    ),
    columns=lambda rules: ("instruction", "output"),
    features=PAIRS,
    example=_alpaca,
)

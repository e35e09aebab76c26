"""What every data format promises: `CONTRACT` is a list of checks of one format, with a tokenizer of bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pyarrow as pa
import pytest
from transformers import PreTrainedTokenizerBase

from deca_ds.config.data import DataConfig
from deca_ds.data.encoding import IGNORED, Encoder
from deca_ds.data.formats import ExampleRules, Format, Use
from deca_ds.data.formats.fields import CONVERSATIONS, PAIRS, TEXTS, check_fields
from deca_ds.data.formats.plain import KTO
from deca_ds.errors import DataError

PLACE = "file, line 3"


def read(format: Format, row: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """The example of a row, and the names of its fields that are not used."""
    rules = ExampleRules(format.name, prompt=DataConfig().prompt)
    unused = check_fields(row, format.fields, PLACE, tuple(format.columns(rules)))
    return format.example(row, rules, PLACE, unused), unused


def the_sample_is_an_example(format: Format, tokenizer: PreTrainedTokenizerBase) -> None:
    """Of the columns that the format names, and nothing of it is left out."""
    example, unused = read(format, dict(format.sample))
    assert format.features in (TEXTS, PAIRS, CONVERSATIONS) and set(example) == set(format.features)
    pa.table({name: [value] for name, value in example.items()}).cast(format.features.arrow_schema)
    assert not unused, f"list {', '.join(unused)} in `fields`"
    is_flat = not any(isinstance(value, list | dict) for value in format.sample.values())
    assert format.tables == is_flat, "set `tables` to whether a row is without lists and objects, as a table's rows are"


def its_answer_is_trained_and_its_prompt_is_not(format: Format, tokenizer: PreTrainedTokenizerBase) -> None:
    example, _ = read(format, dict(format.sample))
    words = {example["answer"]: "word"} if format.has_labels else None
    encoder = Encoder(tokenizer, max_length=400, words=words, conversations=format.features == CONVERSATIONS)
    batch = {name: [value] for name, value in example.items()} | {"place": [PLACE]}
    (ids,), (labels,) = (encoder.sequences(batch)[name] for name in ("input_ids", "labels"))
    trained = tokenizer.decode([label for label in labels if label != IGNORED], skip_special_tokens=True)
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    assert trained and whole.endswith(trained)
    if format.features == TEXTS:
        assert trained == whole == example["text"]
    elif format.features == PAIRS:
        answer = "word" if format.has_labels else example["answer"]
        assert whole.startswith(example["prompt"]) and trained.strip() == answer.strip()
    else:
        answers = [
            turn["content"] for turn in json.loads(example["conversation"])["messages"] if turn["role"] == "assistant"
        ]
        assert all(answer in trained for answer in answers) and trained != whole


def a_row_without_a_column_is_refused_with_its_place(format: Format, tokenizer: PreTrainedTokenizerBase) -> None:
    columns = format.columns(ExampleRules(format.name))
    assert columns and set(columns) <= set(format.sample)
    for column in columns:
        for row in ({k: v for k, v in format.sample.items() if k != column}, {**format.sample, column: {"a": 1}}):
            try:
                read(format, row)
            except DataError as error:
                assert column in error.what and (error.where or "").startswith(PLACE)
            except Exception as error:
                raise AssertionError(
                    f"read {column!r} with text_of or value_of, and raise DataError for what it must not be"
                ) from error
            else:
                raise AssertionError(f"{row} is no row, because of {column!r}: raise DataError")


def every_field_is_treated_as_it_says(format: Format, tokenizer: PreTrainedTokenizerBase) -> None:
    """A refused one stops the run, where it has a value, and so does an answer that is not wanted; one that it does not
    know is told."""
    names = [name for field in format.fields for name in field.names]
    assert len(set(names)) == len(names) and all(field.note for field in (*format.fields, *format.turn_fields))
    for field in (field for field in format.fields if field.use is Use.REFUSED):
        for name in field.names:
            with pytest.raises(DataError, match=f"the field '{name}' has a value") as error:
                read(format, {**format.sample, name: "x"})
            assert error.value.where == PLACE and field.note in (error.value.fix or "")
            read(format, {**format.sample, name: None})
    for name in KTO.names if KTO in format.fields else ():
        try:
            read(format, {**format.sample, name: False})
        except DataError as error:
            assert f"the field '{name}' is false" in error.what
        else:
            raise AssertionError(f"KTO is among `fields`, but {name} is not obeyed: call refuse_unwanted")
    assert read(format, {**format.sample, "never_heard_of": 1})[1] == {"never_heard_of"}


def its_keys_are_those_of_the_configuration(format: Format, tokenizer: PreTrainedTokenizerBase) -> None:
    assert set(format.keys) <= {field.name for field in fields(DataConfig)}
    format.check(DataConfig(format=format.name))
    assert bool(format.turns) == bool(format.turn_fields)


CONTRACT: list[Callable[[Format, PreTrainedTokenizerBase], None]] = [
    the_sample_is_an_example,
    its_answer_is_trained_and_its_prompt_is_not,
    a_row_without_a_column_is_refused_with_its_place,
    every_field_is_treated_as_it_says,
    its_keys_are_those_of_the_configuration,
]

"""Whatever a data file holds, reading it gives rows or one DataError that names the file."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deca_ds.data.examples import ExampleRules, LeftOut, generate_examples
from deca_ds.data.files import COMPRESSIONS, SUFFIXES
from deca_ds.data.formats import FORMATS
from deca_ds.data.sources import read_rows
from deca_ds.errors import DataError

LIGHT = settings(max_examples=60)
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


def rows_of(path, content: bytes) -> list | None:
    """All rows, or None where the file is refused."""
    path.write_bytes(content)
    try:
        rows = list(read_rows(path))
    except DataError as error:
        assert str(path) in str(error)
        return None
    assert all(place.startswith(str(path)) and isinstance(row, dict) for place, row in rows)
    return rows


@pytest.mark.parametrize("suffix", [*SUFFIXES, *(f".jsonl{end}" for end in COMPRESSIONS)])
@LIGHT
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace")))
@example(content=b'{"a": ' + b"9" * 5000 + b"}")
@example(content=b"[" * 100_000)
@example(content=b'{"a": "\xed\xa0\x80"}')
@example(content=b'a,b\n"')
@example(content=b"\x00,\x00\n1,2\n")
def test_any_bytes_give_rows_or_one_error(tmp_path, suffix, content):
    rows_of(tmp_path / f"any{suffix}", content)


@LIGHT
@given(values=st.lists(JSON, max_size=5), lines=st.booleans())
def test_any_json_gives_rows_or_one_error(tmp_path, values, lines):
    text = "\n".join(map(json.dumps, values)) if lines else json.dumps(values)
    rows = rows_of(tmp_path / ("any.jsonl" if lines else "any.json"), text.encode())
    readable = all(isinstance(value, dict | str) for value in values)
    assert (rows is not None) == readable or not lines or not values


@LIGHT
@given(data=st.data())
def test_a_damaged_parquet_file_gives_rows_or_one_error(tmp_path, data):
    path = tmp_path / "damaged.parquet"
    pq.write_table(pa.table({"text": ["one", "two"] * 20, "label": list(range(40))}), path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    rows_of(path, bytes(content[: data.draw(st.integers(0, len(content)))]))


@LIGHT
@given(
    rows=st.lists(
        st.dictionaries(
            st.sampled_from(["text", "label", "instruction", "input", "output", "messages", "conversations"]),
            JSON | st.lists(st.fixed_dictionaries({"role": JSON, "content": JSON, "from": JSON, "value": JSON})),
            max_size=7,
        ),
        max_size=4,
    )
)
def test_any_rows_are_examples_of_a_format_or_one_error(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for format in FORMATS:
        try:
            examples = list(generate_examples([path], ExampleRules(format=format), LeftOut()))
        except DataError as error:
            assert str(path) in str(error)
        else:
            assert len(examples) == len(rows)

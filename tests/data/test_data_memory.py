"""Preparing data holds a part of the rows at a time: nothing of Arrow's grows by a table for every row."""

import pickle
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
from data_samples import make_config, write_jsonl
from datasets import Dataset
from datasets.table import Table

from deca_ds.data import load_client_data
from deca_ds.data.rows import BATCH, column, select_rows


@pytest.fixture
def most(monkeypatch) -> list[int]:
    """The most rows that were gathered one by one at a time, the last of the list's values."""
    found, gather = [0], Table.fast_gather

    def counted(table, places):
        found.append(max(found[-1], len(places)))
        return gather(table, places)

    monkeypatch.setattr(Table, "fast_gather", counted)
    return found


@pytest.mark.parametrize("count", [0, 1, BATCH, 2 * BATCH + 7])
def test_a_column_of_selected_rows_comes_in_parts(most, count):
    rows = Dataset.from_dict({"other": ["x" * 50] * 3000, "name": [f"n{i}" for i in range(3000)]})
    selected = rows.select(np.random.default_rng(0).permutation(3000)[:count])
    values = column(selected, "name")
    assert values.to_pylist() == list(selected["name"]) and values.type == pa.string()
    assert values.num_chunks == -(-count // BATCH)
    assert column(rows, "name").to_pylist() == list(rows["name"])


def test_selected_rows_are_those_that_were_named(tmp_path):
    rows = Dataset.from_dict({"name": [f"n{i}" for i in range(2500)]})
    draw = np.random.default_rng(0)
    selected, expected = rows, np.arange(2500)
    for number, count in enumerate((2500, 2400, 1001, 1001, 0, 0)):
        order = draw.permutation(len(expected))[:count]
        expected = expected[order]
        selected = select_rows(selected, order, tmp_path / f"{number}.arrow")
        assert selected["name"][:] == [f"n{i}" for i in expected] == pickle.loads(pickle.dumps(selected))["name"][:]
    assert select_rows(rows, np.arange(2500), tmp_path / "all.arrow") is rows


def test_which_rows_are_selected_takes_8_bytes_a_row(tmp_path):
    count = 100_000
    rows, order = Dataset.from_dict({"number": range(count)}), np.random.default_rng(0).permutation(count)
    tracemalloc.start()
    try:
        assert select_rows(rows, order, tmp_path / "a.arrow")[:3]["number"] == order[:3].tolist()
        assert tracemalloc.get_traced_memory()[1] < 10 * count, "an array to compare with, and no object of Python's"
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("options", [{"partition": "dirichlet"}, {"packing": True}, {"partition": "iid"}])
def test_no_step_of_a_preparation_holds_all_rows(tokenizer, tmp_path, most, options):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(3 * BATCH)])
    config = make_config(train=[path], partition_column="label", client_holdout=0.1, max_length=12, **options)
    data = load_client_data(config, tokenizer, 0)
    assert sum(data.summary["labels"].values()) == 2700 and 0 < most[-1] <= BATCH


def test_a_selection_is_no_other_one_s(tmp_path):
    """Of what the datasets library knows by its fingerprint, and of the rows that are mapped from its file."""
    rows = Dataset.from_dict({"number": list(range(9))})
    first = select_rows(rows, np.array([7, 1]), tmp_path / "1.arrow")
    again = select_rows(first, np.array([1]), tmp_path / "2.arrow")
    assert (first["number"][:], again["number"][:]) == ([7, 1], [1])
    assert len({rows._fingerprint, first._fingerprint, again._fingerprint}) == 3
    (tmp_path / "other").mkdir()
    other = select_rows(rows, np.array([3]), tmp_path / "other" / "1.arrow")
    assert (
        other._fingerprint != first._fingerprint and other.unique("number") == [3] and first.unique("number") == [7, 1]
    )
    with pytest.raises(FileExistsError):
        select_rows(rows, np.array([0, 2]), tmp_path / "1.arrow")
    assert first["number"][:] == [7, 1]

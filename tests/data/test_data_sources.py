"""Files, folders, globs and hub names; every malformed row is named with file and line."""

import io
import json
import tracemalloc

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_samples import write_jsonl
from huggingface_hub import constants

from deca_ds.data import sources, strict_json
from deca_ds.data.sources import HubName, find_sources, load_hub, read_rows
from deca_ds.errors import DataError

ROWS = [{"text": "one, two", "label": "a"}, {"text": 'say "hi"', "label": "b"}]


def rows_of(path, **options):
    return [row for _, row in read_rows(path, **options)]


@pytest.mark.parametrize("kind", ["list", "data", "lines", "one"])
def test_json_is_read_as_a_list_an_object_with_data_lines_or_one_row(tmp_path, kind):
    path = tmp_path / "rows.json"
    content = {
        "list": json.dumps(ROWS, indent=1),
        "data": json.dumps({"data": ROWS, "version": 1}),
        "lines": "\n".join(map(json.dumps, ROWS)),
        "one": json.dumps(ROWS[0]),
    }[kind]
    path.write_text(content)
    assert rows_of(path) == (ROWS[:1] if kind == "one" else ROWS)


JSON_LISTS = [
    "[]", " [ ]\r\n", "[1, 2.5e-3, -0.0E+1, true, false, null, NaN, -Infinity, 1e5]",
    '["", "\\\\", "\\"", "\\ud83d\\ude00"]',
    '\n[\n{"a": [1, {"b": "c]}"}]},\n\t{"a": {}}\n]\n',
    "[" + ", ".join(f'{{"text": "{n * "é"}"}}' for n in range(60)) + "]",
]  # fmt: skip
NO_JSON_LISTS = [
    "[", "[1", "[1,", "[1,]", "[,1]", "[1 2]", '["a\n"]', '["\\x"]', '["\\u12"]',
    '[{"a": 1, }]', "[1]\n[2]", "[1]]", '[\n"a',
    '[{"a": 1,\n"b": tru}, {"c": 2}]', '[{"a": ' + "1" * 30 + "} {]", "[nul]",
]  # fmt: skip


@pytest.mark.parametrize("part", [1, 2, 7, 100, 10**6])
def test_a_json_list_is_read_in_parts_as_it_would_be_whole(monkeypatch, part):
    monkeypatch.setattr(strict_json, "PART", part)
    for text in JSON_LISTS:
        assert repr(list(strict_json.Reader(io.StringIO(text)).items())) == repr(json.loads(text)), text
    for text in NO_JSON_LISTS:
        with pytest.raises(json.JSONDecodeError) as whole:
            json.loads(text)
        with pytest.raises(json.JSONDecodeError) as error:
            list(strict_json.Reader(io.StringIO(text)).items())
        assert error.value.lineno == whole.value.lineno, text


def test_of_a_json_list_only_the_largest_row_has_to_be_in_memory(tmp_path):
    path = tmp_path / "a.json"
    rows = [{"text": f"{number} " + "x" * 100_000} for number in range(300)]
    path.write_text(json.dumps(rows))
    tracemalloc.start()
    try:
        for number, (place, row) in enumerate(read_rows(path)):
            assert row == rows[number] and place == f"{path}, row {number + 1}"
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size / 3
    finally:
        tracemalloc.stop()


def test_a_mistake_in_a_json_list_is_told_before_the_rest_is_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1 2},\n' + '{"a": "' + "x" * 20_000_000 + '"}]')
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"not valid JSON: Expecting ',' delimiter[\s\S]*a\.json, line 1"):
            rows_of(path)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_strings_in_a_json_list_and_text_files_are_texts(tmp_path):
    (tmp_path / "a.json").write_text('["one", "two"]')
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\n")
    assert rows_of(tmp_path / "a.json") == [{"text": "one"}, {"text": "two"}]
    assert rows_of(tmp_path / "a.txt") == [{"text": "one\n\ntwo\n"}]


def test_csv_is_read_with_quoting_and_tsv_without(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbftext,label\n"one, two",a\n\n"say ""hi""",b\n')
    (tmp_path / "b.csv").write_text('"one, two",a\n"say ""hi""",b\n')
    (tmp_path / "c.tsv").write_text('text\tlabel\none, two\ta\nsay "hi"\tb\n')  # no quoting in TSV
    assert rows_of(tmp_path / "a.csv") == ROWS
    assert rows_of(tmp_path / "b.csv", column_names=["text", "label"]) == ROWS
    assert rows_of(tmp_path / "c.tsv") == ROWS
    with pytest.raises(DataError, match=r"(?s)names of the columns stand in a row.*a\.csv, line 1"):
        rows_of(tmp_path / "a.csv", column_names=["text", "label"])


def test_values_that_other_readers_take_for_missing_stay_texts(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\nNA,null\n1,None\n")
    assert rows_of(path) == [{"text": "NA", "label": "null"}, {"text": "1", "label": "None"}]


def test_parquet_is_read_row_by_row_and_malformed_files_are_refused(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert list(read_rows(tmp_path / "a.parquet"))[1] == (f"{tmp_path / 'a.parquet'}, row 2", ROWS[1])
    (tmp_path / "b.parquet").write_text("no parquet")
    with pytest.raises(DataError, match=r"(?s)Parquet.*b\.parquet"):
        rows_of(tmp_path / "b.parquet")
    calls = [
        {"calls": [{"name": "f", "arguments": {"x": 1}}]},
        {"calls": [{"name": "g", "arguments": {"y": {"z": []}}}]},
    ]
    pq.write_table(pa.Table.from_pylist([*calls, {"calls": None}]), tmp_path / "d.parquet")
    assert rows_of(tmp_path / "d.parquet") == [*calls, {"calls": None}], "no keys of other rows' objects"
    pq.write_table(pa.Table.from_arrays([pa.array(["x"])] * 2, ["text"] * 2), tmp_path / "c.parquet")
    with pytest.raises(DataError, match=r"(?s)two columns named 'text'.*c\.parquet"):
        rows_of(tmp_path / "c.parquet")


@pytest.mark.parametrize(
    ("name", "content", "place", "what"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"text": "y"\n', "a.jsonl, line 3, column 13", "not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\r\n{"text":\r\n', "a.jsonl, line 2, column 9", "not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', "a.jsonl, line 2", "UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', "a.jsonl, line 2", "a row is a list"),
        ("a.json", b'[\n{"text": "x"},\n{"text": }\n]', "a.json, line 3, column 10", "not valid JSON"),
        ("a.json", b'[{"text": "x"}, 7]', "a.json, row 2", "a row is a int"),
        ("a.json", b"3", "a.json", "holds a int"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "x", "text": "y"}\n', "a.jsonl, line 2", "two values named 'text'"),
        ("a.json", b'[{"a": 1}, {"a": {"b": 1, "b": 1}}]', "a.json, row 2", "two values named 'b'"),
        ("a.json", b'{"a": 1}\n{"b": 1, "b": 1}\n', "a.json, line 2", "two values named 'b'"),
        ("a.json", b'[\n{"text": "x"},\n{"text": "\xff"}]', "a.json, line 3", "UTF-8"),
        ("a.json", b'[{"text": "x"}]\n[]', "a.json, line 2", "Extra data"),
        ("a.json", b'{\n"a": 1\n}\n{"a": 1}', "a.json, line 4", "Extra data"),
        ("a.csv", b"text,label\nx,a\ny\n", "a.csv, line 3", "1 columns instead of 2"),
        ("a.csv", b"text,label\nx,a,b\n", "a.csv, line 2", "3 columns instead of 2"),
        ("a.csv", b'text,label\nx,a\n"y,b\nz\n', "a.csv, line 3", "malformed row"),
        ("a.csv", b"text,label\nx,a\n\xff,b\n", "a.csv, line 3", "UTF-8"),
        ("a.csv", b"text,text\nx,a\n", "a.csv, line 1", "twice"),
        ("a.csv", b"text,label\nx,a\n\ntext,label\ny,b\n", "a.csv, line 4", "names of the columns stand in a row"),
        ("a.tsv", b"text\tlabel\nx\n", "a.tsv, line 2", "1 columns instead of 2"),
        ("a.txt", b"fine\n\xff", "a.txt, line 2", "UTF-8"),
    ],
)
def test_malformed_files_name_the_line(tmp_path, name, content, place, what):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=what) as error:
        rows_of(path)
    assert error.value.where.startswith(str(tmp_path / place))


def test_entries_become_files_in_order_each_once(tmp_path):
    for name in ("b.json", "a.jsonl", "deep/c.csv", "README.md", ".hidden.json", ".cache/d.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("[]")
    files = [tmp_path / name for name in ("a.jsonl", "b.json", "deep/c.csv")]
    assert find_sources([str(tmp_path)], "data.train") == files
    assert find_sources([str(tmp_path / "*.json*"), str(files[0])], "data.train") == files[:2]
    assert find_sources([str(tmp_path / "**/*.csv")], "data.train") == files[2:]
    bracket = tmp_path / "x[1].json"
    bracket.write_text("[]")
    assert find_sources([str(bracket)], "data.train") == [bracket]


@pytest.mark.parametrize(
    "entry",
    ["/" + "n" * 300, "./nothing", "/no/where", "no.json", "no/such/thing", "~/nothing.csv", "my data"],
)
def test_a_missing_path_is_no_hub_name(entry):
    with pytest.raises(DataError, match=r"(?s)no such file.*data\.train"):
        find_sources([entry], "data.train")


def test_an_entry_without_readable_files_is_refused_with_the_reason(tmp_path):
    (tmp_path / "a.xml").write_text("")
    with pytest.raises(DataError, match=r"(?s)unknown kind.*a\.xml.*\.jsonl"):
        find_sources([str(tmp_path / "a.xml")], "data.train")
    with pytest.raises(DataError, match="no data files in the folder"):
        find_sources([str(tmp_path)], "data.train")
    with pytest.raises(DataError, match="no file matches"):
        find_sources([str(tmp_path / "*.json")], "data.train")
    with pytest.raises(DataError, match="no such file"):
        find_sources(["owner/name"], "data.per_client[0]", hub=False)


def test_a_hub_name_may_have_a_split_and_is_loaded_with_it(monkeypatch):
    names = find_sources(["owner/name-v1.1", "ag_news:test"], "data.train")
    assert names == [HubName("owner/name-v1.1"), HubName("ag_news", "test")]
    asked = []

    def load(*arguments, **options):
        asked.append((arguments, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(sources, "load_dataset", load)
    assert list(load_hub(names[0], "small", "train")) == ROWS
    load_hub(names[1], None, "train")
    assert asked == [(("owner/name-v1.1", "small"), {"split": "train"}), (("ag_news", None), {"split": "test"})]


def test_an_unreachable_hub_is_one_clear_error(monkeypatch):
    def load(*_, **__):
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub\nmore")

    monkeypatch.setattr(sources, "load_dataset", load)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(
        DataError, match=r"(?s)no file or folder 'owner/name' in /.*ConnectionError: Couldn't reach.*data\.subset"
    ):
        load_hub(HubName("owner/name"), None, "train")


def test_a_very_long_field_is_read(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "x" * 200_000 + "\n")
    assert len(rows_of(path)[0]["text"]) == 200_000


def test_rows_come_lazily(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    path.write_text(path.read_text() + "broken")
    rows = read_rows(path)
    assert next(rows)[1] == {"text": "x"}
    with pytest.raises(DataError, match="line 2"):
        next(rows)

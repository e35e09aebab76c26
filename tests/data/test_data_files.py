"""Which files are data, what is left out and why, and files that are compressed."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import tracemalloc

import datasets
import pyarrow as pa
import pytest
from data_samples import make_config, write_jsonl

from deca_ds.data import sources, validate_data_config
from deca_ds.data.cache import Cache
from deca_ds.data.checks import tell_files
from deca_ds.data.examples import ExampleRules, read_examples
from deca_ds.data.files import kind_of
from deca_ds.data.sources import find_sources, look_through, read_rows
from deca_ds.errors import ConfigError, DataError

ROWS = [{"text": "one"}, {"text": "two"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.compress(content, codec="zstd", asbytes=True),
}


def put(folder, **contents):
    """Files of these names and contents, bytes or text."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def found_in(folder, entry=None):
    sources, found = look_through([str(entry or folder)], "data.train")
    assert sources == list(found.files)
    return [file.name for file in sources], {file.name: why for file, why in found.left_out.items()}


def test_of_a_folder_the_data_files_are_read_and_the_others_told_with_the_reason(tmp_path):
    put(tmp_path, **{"a.jsonl": LINES, "b.jsonl.gz": gzip.compress(LINES), "c.ndjson": LINES, "README.txt": "Read me."})
    put(tmp_path, **{"LICENSE-2.0.TXT": "Free.", "dataset_info.json": "{}", "notes.md": "x", ".d.jsonl": LINES})
    put(tmp_path, **{"empty.jsonl": "", "e.JSON": json.dumps(ROWS)})
    put(tmp_path / ".git", **{"f.jsonl": LINES})
    names, left_out = found_in(tmp_path)
    assert names == ["a.jsonl", "b.jsonl.gz", "c.ndjson", "e.JSON"]
    assert left_out == {
        "README.txt": "goes along with data",
        "LICENSE-2.0.TXT": "goes along with data",
        "dataset_info.json": "describes a data set",
        "notes.md": "another kind of file",
        ".d.jsonl": "hidden",
        ".git": "hidden",
        "empty.jsonl": "empty",
    }
    examples = read_examples(find_sources([str(tmp_path)], "data.train"), ExampleRules("text"), Cache()).examples
    assert examples["text"][:] == ["one", "two"] * 4 and not any(examples["document"])
    assert found_in(tmp_path, tmp_path / "[aRc]*")[0] == ["a.jsonl", "c.ndjson"]


def test_what_is_read_and_what_is_not_is_told(tmp_path):
    put(tmp_path, **{"a.jsonl": LINES, "README.txt": "x"})
    for number in range(12):
        put(tmp_path / "many", **{f"{number:02}.jsonl": LINES})
    config = make_config(train=["owner/name", tmp_path / "[aR]*"], evaluation=[tmp_path / "many"])
    assert tell_files(config.data) == [
        f"data.train: owner/name of the hub, 1 file: {tmp_path}/a.jsonl; "
        f"left out: {tmp_path}/README.txt (goes along with data)",
        "data.evaluation: 12 files: " + ", ".join(f"{tmp_path}/many/{n:02}.jsonl" for n in range(8)) + " and 4 more",
    ]
    private = make_config(clients=2, per_client=[tmp_path / "a.jsonl", "/only/there.jsonl"])
    assert tell_files(private.data) == []
    assert tell_files(private.data, 0) == [f"data.per_client[0]: 1 file: {tmp_path}/a.jsonl"]


@pytest.mark.parametrize("end", COMPRESS)
def test_compressed_files_are_read_like_plain_ones_and_damaged_ones_refused(tmp_path, end):
    compress = COMPRESS[end]
    for name, content in {
        "a.jsonl": LINES,
        "a.json": json.dumps(ROWS).encode(),
        "b.json": LINES,
        "a.csv": b"text\none\ntwo\n",
        "a.TSV": b"\xef\xbb\xbftext\none\ntwo\n",
    }.items():
        (tmp_path / (name + end.upper())).write_bytes(compress(content))
        assert [row for _, row in read_rows(tmp_path / (name + end.upper()))] == ROWS
    whole = tmp_path / f"two.jsonl{end}"
    whole.write_bytes(compress(LINES) + compress(LINES))
    assert len(list(read_rows(whole))) == 4
    (tmp_path / f"a.txt{end}").write_bytes(compress(b"one document"))
    document = read_examples([tmp_path / f"a.txt{end}"], ExampleRules("text"), Cache()).examples
    assert (document["text"][:], document["document"][:]) == (["one document"], [True])
    with pytest.raises(ConfigError, match=r"\.txt file has no columns"):
        validate_data_config(make_config(train=[tmp_path / f"a.txt{end}"], format="alpaca"))
    for damaged in (compress(LINES)[:-9], b"plain text", compress(LINES)[:20] + b"\0" * 9 + compress(LINES)[29:]):
        path = tmp_path / f"damaged.jsonl{end}"
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"damaged\.jsonl\{end}"):
            list(read_rows(path))
    path.write_bytes(compress(b'{"text": "x"}\n{"text": "\xff"}\n'))
    with pytest.raises(DataError, match=r"(?s)not UTF-8.*, line 2"):
        list(read_rows(path))


@pytest.mark.parametrize("end", COMPRESS)
def test_compressed_lines_are_not_read_as_a_whole(tmp_path, end):
    line = json.dumps({"text": "x" * 100_000}).encode() + b"\n"
    (tmp_path / f"a.jsonl{end}").write_bytes(COMPRESS[end](line * 200))  # 20 MB
    tracemalloc.start()
    assert sum(1 for _ in read_rows(tmp_path / f"a.jsonl{end}")) == 200
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12e6  # xz has a dictionary of 8 MiB


def test_where_a_file_is_no_utf8_is_found_without_reading_whole_lines(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    monkeypatch.setattr(sources, "PART", 3)  # which cuts letters of two bytes and more
    for text, line in (
        ("ä€\n".encode() * 5 + b"x\n\nx\xff\n", 8),
        ("€".encode() * 40 + b"\xe2\n", 1),
        (b"\n" * 7 + "€".encode()[:2], 8),
        (b"\xff", 1),
    ):
        path.write_bytes(text)
        assert sources.undecodable_line(path) == f"{path}, line {line}"
    longest = tmp_path / "b.json"
    longest.write_bytes(b'["' + b"x" * 8_000_000 + b"\xff" + b'"]')
    monkeypatch.undo()
    tracemalloc.start()
    with pytest.raises(DataError, match=r"(?s)not UTF-8.*b\.json, line 1"):
        raise DataError("not UTF-8 text", where=sources.undecodable_line(longest))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6e6


def test_a_file_whose_name_says_no_known_kind_is_refused(tmp_path):
    for name in ("a.parquet.gz", "a.gz", "a.tar.gz", "a.jsonl.zip", "a.jsonl.lz4", "a.xlsx", "jsonl"):
        assert kind_of(tmp_path / name) == ""
        (tmp_path / name).write_text("x")
        with pytest.raises(DataError, match=r"(?s)unknown kind.*\.zst"):
            find_sources([str(tmp_path / name)], "data.train")


def test_links_are_followed_each_file_is_read_once_and_a_dangling_link_is_refused(tmp_path):
    put(tmp_path / "blobs", **{"0a1b": LINES, "2c3d": json.dumps([{"text": "three"}])})
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.jsonl").symlink_to("../blobs/0a1b")  # as in the cache of the hub
    (data / "b.json").symlink_to("../blobs/2c3d")
    (data / "c.jsonl").symlink_to("../blobs/0a1b")
    os.link(tmp_path / "blobs/2c3d", data / "d.json")
    (data / "sub").symlink_to("../more")
    put(tmp_path / "more", **{"e.jsonl": LINES})
    (tmp_path / "more/up").symlink_to("..")
    names, left_out = found_in(data)
    assert names == ["a.jsonl", "b.json", "e.jsonl"]
    assert left_out["c.jsonl"] == f"the same file as {data}/a.jsonl" and left_out["d.json"].endswith("b.json")
    texts = read_examples(find_sources([str(data)], "data.train"), ExampleRules("text"), Cache()).examples["text"][:]
    assert texts == ["one", "two", "three", "one", "two"]
    (data / ".#a.jsonl").symlink_to("me@host.1")  # an editor's
    assert found_in(data)[1][".#a.jsonl"] == "hidden"
    (data / "f.jsonl").symlink_to("nowhere")
    for entry in (data, data / "f.jsonl", data / "*.jsonl"):
        with pytest.raises(DataError, match=r"link to 'nowhere', which is not there"):
            find_sources([str(entry)], "data.train")
    (data / "f.jsonl").rename(data / "folder")
    with pytest.raises(DataError, match=r"link to 'nowhere', which is not there"):
        find_sources([str(data)], "data.train")


def test_what_may_be_meant_in_two_ways_is_refused(tmp_path):
    put(tmp_path / "mixed", **{"a.jsonl": LINES, "b.txt": "Once upon a time."})
    with pytest.raises(DataError, match=r"(?s)files of rows .*a\.jsonl.*whole texts .*b\.txt"):
        find_sources([str(tmp_path / "mixed")], "data.train")
    both = [str(tmp_path / "mixed/*.jsonl"), str(tmp_path / "mixed/*.txt")]
    assert len(find_sources(both, "data.train")) == 2
    put(tmp_path / "twice", **{"a.jsonl": LINES, "a.jsonl.gz": gzip.compress(LINES)})
    with pytest.raises(DataError, match=r"a\.jsonl' and .*a\.jsonl\.gz' look like one file"):
        find_sources([str(tmp_path / "twice")], "data.train")
    put(tmp_path / "kinds", **{"a.jsonl": LINES, "b.csv": b"text\nx\n"})
    assert len(find_sources([str(tmp_path / "kinds")], "data.train")) == 2
    put(tmp_path / "kinds", **{"a.csv": b"text\nx\n"})
    with pytest.raises(DataError, match=r"a\.csv' and .*a\.jsonl' look like one file"):
        find_sources([str(tmp_path / "kinds")], "data.train")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match="no regular file"):
        find_sources([str(tmp_path / "pipe.jsonl")], "data.train")
    for entry in ("", " "):
        with pytest.raises(DataError, match="empty path"):
            find_sources([entry], "data.train")


def test_parts_of_a_data_set_are_not_trained_on_together(tmp_path):
    for names in (
        ("train.jsonl", "test.jsonl"),
        ("local_train_3.jsonl", "local_eval_3.jsonl"),
        ("data/train-00000.jsonl", "data/validation-00000.jsonl"),
        ("train/a.jsonl", "dev/a.jsonl"),
        ("myTrainSet.jsonl", "devset.jsonl"),
    ):
        folder = tmp_path / names[0].replace("/", "_")
        for name in names:
            put((folder / name).parent, **{(folder / name).name: LINES})
        for entry in (folder, folder / "**/*.jsonl"):
            with pytest.raises(DataError, match=r"(?s)several parts of a data set.*train: .*name those"):
                find_sources([str(entry)], "data.train")
        assert len(find_sources([str(folder / name) for name in names], "data.train")) == 2
    put(tmp_path / "test/one", **{"train-1.jsonl": LINES, "train-2.jsonl": LINES, "more.jsonl": LINES})
    assert len(find_sources([str(tmp_path / "test/one")], "data.train")) == 3


def test_a_folder_that_lacks_some_of_its_files_is_refused(tmp_path):
    entry = [str(tmp_path)]
    put(tmp_path, **{f"rows-0000{n}-of-00003.jsonl": LINES for n in (0, 2)}, **{"b_1_of_1.jsonl": LINES})
    with pytest.raises(DataError, match=r"rows-\*\.jsonl lack number 1 of 3"):
        find_sources(entry, "data.train")
    assert len(find_sources([str(tmp_path / "*")], "data.train")) == 3, "a glob may be meant to match some"
    put(tmp_path, **{"rows-00001-of-00003.jsonl": LINES})
    assert len(find_sources(entry, "data.train")) == 4
    put(tmp_path, **{"rows-00000-of-00002.jsonl": LINES})
    with pytest.raises(DataError, match=r"rows-\*\.jsonl are of 2 and of 3"):
        find_sources(entry, "data.train")


def test_what_is_trained_on_and_scored_on_is_told(tmp_path):
    put(tmp_path, **{"a.jsonl": LINES, "b.jsonl": LINES})
    (tmp_path / "c.jsonl").symlink_to("a.jsonl")
    config = make_config(train=[tmp_path / "a.jsonl"], evaluation=[tmp_path / "b.jsonl", tmp_path / "c.jsonl"])
    warning = f"WARNING: data.evaluation scores on what is trained on: {tmp_path}/c.jsonl"
    assert tell_files(config.data)[-1] == warning
    private = make_config(per_client=[tmp_path / "a.jsonl"], per_client_evaluation=[tmp_path / "b.jsonl"])
    assert not any("WARNING" in line for line in tell_files(private.data, 0))


def test_what_git_lfs_has_not_fetched_is_no_data(tmp_path):
    for name in ("a.txt", "a.jsonl", "a.parquet"):
        put(tmp_path, **{name: "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"})
        with pytest.raises(DataError, match=r"(?s)pointer of Git LFS.*git lfs pull"):
            list(read_rows(tmp_path / name))


def test_of_a_folder_saved_by_datasets_the_current_files_are_read(tmp_path):
    saved = datasets.Dataset.from_list([*ROWS, {"text": "three"}])
    saved.save_to_disk(tmp_path / "one", num_shards=2)
    (tmp_path / "one/data-00000-of-00001.arrow").write_bytes(b"older")
    names, left_out = found_in(tmp_path / "one")
    assert names == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    assert left_out["data-00000-of-00001.arrow"] == "not in state.json"
    examples = read_examples(
        find_sources([str(tmp_path / "one")], "data.train"), ExampleRules("text"), Cache()
    ).examples
    assert examples["text"][:] == ["one", "two", "three"]
    table = pa.table({"text": ["four"]})
    with pa.ipc.new_file(tmp_path / "file.arrow", table.schema) as file:
        file.write_table(table)
    assert list(read_rows(tmp_path / "file.arrow")) == [(f"{tmp_path}/file.arrow, row 1", {"text": "four"})]
    datasets.DatasetDict(train=saved, test=saved).save_to_disk(tmp_path / "several")
    with pytest.raises(DataError, match=r"(?s)several data sets: test, train.*name the one"):
        find_sources([str(tmp_path / "several")], "data.train")
    assert len(find_sources([str(tmp_path / "several/test")], "data.train")) == 1


def test_a_folder_is_no_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner/name").symlink_to("../")
    assert [file.name for file in find_sources(["owner/name"], "data.train")] == ["a.jsonl"]
    for missing in ("owner/name/", "$NOWHERE/data", "owner/none.jsonl"):
        with pytest.raises(DataError, match="no such file or folder"):
            find_sources([missing.replace("name/", "gone/")], "data.train")


def test_a_cache_that_is_named_must_be_writable(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(ConfigError, match=r"(?s)cannot write to.*there is a file.*data\.cache"):
        validate_data_config(make_config(train=[file], cache=str(file / "cache")))

"""What is kept of prepared data is told with its size, and removed when it is old."""

import os
import time
from pathlib import Path

import pytest
from data_samples import make_config, write_jsonl

from deca_ds.cli import main
from deca_ds.data import load_client_data
from deca_ds.data.cache import NOTE
from deca_ds.data.kept import kept


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def load(tmp_path, folder, tokenizer):
    """Prepare, or find again, the data of a run with sequences of so many tokens."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"text {i}"} for i in range(20)])
    return lambda length: load_client_data(
        make_config(train=[path], cache=str(folder), max_length=length), tokenizer, 0
    )


def age(folder: Path, days: float) -> None:
    for entry in kept(folder):
        os.utime(entry.folder / NOTE, (time.time() - days * 86400,) * 2)


def test_old_entries_are_removed_and_those_in_use_stay(load, folder, capsys):
    old, new = load(8), load(9)
    assert [entry.kind for entry in kept(folder)].count("tokens") == 2
    age(folder, 40)
    load(9)
    assert main(["cache", str(folder), "--remove", "30"]) == 0
    told = capsys.readouterr().out
    assert "examples: 1 entry" in told and "tokens: 2 entries" in told
    assert "removed 2 of 3, " in told, "the examples, too: with the tokens nobody needs them"
    (left,) = (entry for entry in kept(folder) if entry.kind == "tokens")
    assert left.bytes == sum(path.stat().st_size for path in left.folder.iterdir())
    assert old.train[0]["input_ids"], "a run that has mapped it continues"
    assert load(8).content == old.content and load(9).content == new.content


def test_nothing_is_left_of_what_is_removed(load, folder, capsys):
    load(8)
    assert main(["cache", str(folder)]) == 0 and "--remove 30" in capsys.readouterr().out
    assert main(["cache", str(folder), "--remove", "0"]) == 0
    assert list(folder.iterdir()) == [] and kept(folder) == []
    assert main(["cache", str(folder)]) == 0 and capsys.readouterr().out.endswith(f"{folder}: 0 bytes\n")


@pytest.mark.parametrize(("arguments", "message"), [(["nowhere"], "no folder"), (["--remove", "-1"], "number of days")])
def test_a_missing_folder_and_a_negative_age_are_refused(arguments, message, capsys):
    assert main(["cache", *arguments]) == 2
    assert message in capsys.readouterr().err

"""`deca data`: what it counts, what it marks as trained, and what it leaves closed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import datasets
import pytest
import yaml
from rich.console import Console

from deca_ds.cli import main
from deca_ds.tools.data.histogram import Bin, bins, line, quantile
from deca_ds.tools.data.look import Piece
from deca_ds.tools.data.show import rendered

# words of the tiny tokenizer; an assistant's turn stands between w2 and w3
TEMPLATE = (
    "{% for m in messages %}{{ {'system': 'w0', 'user': 'w1', 'assistant': 'w2', 'tool': 'w4'}[m.role] }} "
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %} {{ c.function.name }} {{ c.function.arguments.at }}"
    "{% endfor %} w3 {% endfor %}{% if add_generation_prompt %}w2 {% endif %}"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def look(tiny_model, tmp_path, capsys):
    """Runs the command; what it printed, read if it is JSON."""

    def look(data: dict, *arguments: str, clients: int = 1):
        config = tmp_path / "run.yaml"
        model = {"path": data.pop("model", str(tiny_model))}
        config.write_text(yaml.safe_dump({"cluster": {"clients": clients}, "model": model, "data": data}))
        code = main(["data", str(config), *arguments])
        out, err = capsys.readouterr()
        assert code == 0, err
        return json.loads(out) if "--json" in arguments else out

    return look


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows(*texts: str, label: str = "red") -> list[dict]:
    return [{"text": text, "label": label} for text in texts]


def test_labels_lengths_tokens_and_repeats_are_counted(look, tmp_path):
    both = rows("w1 w2", "w1  W2", "w3", "w4 " * 20) + rows("w5", "w6", label="[blue]")
    data = {"train": [write(tmp_path / "train.jsonl", both)], "format": "classification", "partition": "key"}
    data |= {"evaluation": [write(tmp_path / "eval.jsonl", rows("w3", "w9"))], "client_holdout": 0.0, "max_length": 16}
    found = look(data, "--json", clients=2)
    assert not found["sample"] and len(found["files"]) == 2
    red, blue = found["clients"]
    assert red["labels"] == {"train": {"red": 4}, "own_evaluation": {}, "common_evaluation": {"red": 2}}
    assert blue["labels"]["train"] == {"[blue]": 2}
    # "<words> Label : red </s>"
    assert red["lengths"] == [[5, 1], [6, 2], [24, 1]] and (red["cut"], red["dropped"]) == (1, 0)
    assert red["train_tokens"] == 5 + 6 + 6 + 16 and red["target_tokens"] == 4 * 2
    assert red["masked_tokens"] == red["train_tokens"] - red["target_tokens"]
    assert (red["again"], red["elsewhere"], found["repeats"]["common"]) == (1, 0, 1)
    (again,), (scored,) = found["repeats"]["again"], found["repeats"]["scored"]
    assert [place.rpartition(", ")[2] for place in again["places"]] == ["line 2", "line 1"]
    assert [Path(place).name for place in scored["places"]] == ["eval.jsonl, line 1", "train.jsonl, line 3"]
    told = look(data, clients=2)
    headings = ("repeated", "also at others", "own eval trained on")
    assert all(re.search(rf"┃ {heading} +┃", told) for heading in headings)
    assert "common evaluation set: 2 examples, 1 of them trained on" in told and "WARNING: 1 scored example" in told
    assert (
        "[blue]" in told
        and re.search(r"red +│ +4 │ +- │ +2 │", told)
        and "\x1b" not in told
        and max(map(len, told.split("\n"))) < 300
    )
    assert re.search(r"17 to 32 +█+\S? +1 +cut", told) and "[[red </s>]]" in told.replace("[[ ", "[[")


def test_a_sample_reads_the_beginning_of_each_file_and_says_so(look, tmp_path):
    path = write(tmp_path / "a.jsonl", rows("w1", "w2", "w3", "w4"))
    (tmp_path / "a.jsonl").open("a").write("no JSON")
    told = look({"train": [path], "client_holdout": 0.0}, "--sample", "3", "--examples", "0")
    assert "A SAMPLE: the first 3 rows of each file" in told and re.search(r"│ +0 │ +3 │", told)
    assert not (tmp_path / "cache").exists(), "and leaves nothing behind"


def test_clients_whose_private_files_are_elsewhere_are_left_out_and_other_files_stay_closed(look, tmp_path):
    mine, others = write(tmp_path / "mine.jsonl", rows("w1", "w2", "w3")), tmp_path / "others.jsonl"
    data = {"per_client": [str(tmp_path / "nowhere.jsonl"), mine, str(others)], "client_holdout": 0.0}
    others.write_text("w1 w2")  # no JSON, as an error would tell
    found = look(dict(data), "--json", "--client", "1", clients=3)
    assert [client["client"] for client in found["clients"]] == [1] and not found["elsewhere"]
    write(others, rows("w2", "w4"))
    found = look(dict(data), "--json", clients=3)
    assert [client["client"] for client in found["clients"]] == [1, 2] and list(found["elsewhere"]) == ["0"]
    assert [client["elsewhere"] for client in found["clients"]] == [1, 1]
    assert "client 0 is left out, as this machine does not have its files: no such file" in look(data, clients=3)


def test_turns_of_a_conversation_are_marked_as_the_template_has_them(look, tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))
    call = {"id": "a", "type": "function", "function": {"name": "w20", "arguments": {"at": "w21"}}}
    turns = [
        {"role": "system", "content": "w10"},
        {"role": "user", "content": "w11"},
        {"role": "assistant", "content": "w12", "weight": 0},
        {"role": "user", "content": "w13"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "w14"},
        {"role": "assistant", "content": "w15 w16"},
    ]
    data = {"train": [write(tmp_path / "chat.jsonl", [{"messages": turns}])], "format": "messages"}
    told = look(data | {"model": str(model), "client_holdout": 0.0})
    shown = " ".join(told.rpartition("them trained")[2].split())
    shown = re.sub(r" ?\[\[ ?", " [[", shown)
    assert shown == "w0 w10 w3 w1 w11 w3 w2 w12 w3 w1 w13 w3 w2 [[w20 w21 w3]] w4 w14 w3 w2 [[w15 w16 w3]]"


def test_colour_marks_what_is_trained_and_nothing_in_the_data_reaches_the_terminal():
    text = rendered([Piece("a\x1b[31m\u202e", False), Piece("b" * 2000, True)], colour=True)
    assert text.plain.startswith("a\\u001b[31m\\u202ebbb") and " ... 1,400 characters ... " in text.plain
    console = Console(force_terminal=True, color_system="standard", width=80)
    with console.capture() as captured:
        console.print(rendered([Piece("a", False), Piece("b", True)], colour=True))
    assert captured.get() == "a\x1b[1;32mb\x1b[0m\n"


def test_bins_end_at_the_longest_length_that_is_kept():
    assert bins([[3, 5], [100, 1]], 10) == [
        Bin(1, 2, 0, False), Bin(3, 4, 5, False), Bin(5, 6, 0, False), Bin(7, 8, 0, False), Bin(9, 10, 0, False),
        Bin(11, 20, 0, True), Bin(21, 40, 0, True), Bin(41, 80, 0, True), Bin(81, 160, 1, True),
    ]  # fmt: skip
    assert bins([[1, 2]], 10) == [Bin(1, 1, 2, False)]
    assert line(bins([[1, 1], [2, 800]], 2)) == "▁█"
    assert [quantile([[1, 98], [7, 2]], share) for share in (0.5, 0.98, 0.99)] == [1, 1, 7]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--client", "2"], "there is no client 2"),
        (["--sample", "0"], "--sample 0 is no number of rows"),
        (["--examples", "-1"], "--examples -1 is no number of them"),
        (["--sample", "1", "data.format=classification"], "in the first 1 rows of each file"),
    ],
)
def test_a_client_or_a_number_that_cannot_be_is_refused(arguments, message, tiny_model, tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [*rows("w1"), *rows("w2", label="blue")])
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {{path: {tiny_model}}}\ncluster: {{clients: 2}}\ndata: {{train: [{path}]}}\n")
    overrides = [one for one in arguments if "=" in one]
    assert main(["data", str(config), *overrides, *(one for one in arguments if "=" not in one)]) == 2
    assert message in capsys.readouterr().err

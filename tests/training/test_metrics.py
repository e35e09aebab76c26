import json

from deca_ds.training.metrics import JsonLines, _numbers


def test_lines_are_on_disk_as_soon_as_written(tmp_path):
    lines = JsonLines(tmp_path / "deep" / "m.jsonl")
    lines.write({"step": 1})
    lines.write({"step": 2})
    assert [json.loads(line) for line in (tmp_path / "deep" / "m.jsonl").read_text().splitlines()] == [
        {"step": 1},
        {"step": 2},
    ]
    lines.close()


def test_numbers_of_nested_records_have_paths():
    record = {"own": {"loss": 1.5, "recall": {"red": 1}}, "block": "layer 0", "lr": 0.1}
    assert dict(_numbers(record)) == {"own/loss": 1.5, "own/recall/red": 1.0, "lr": 0.1}

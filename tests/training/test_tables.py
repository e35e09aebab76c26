from rich.console import Console

from deca_ds.algorithm.blocks import Block, BlockPlan
from deca_ds.algorithm.rule import split_by_decay
from deca_ds.training.tables import block_table, data_table, print_notes


def shown(table) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_data_table_has_a_row_per_client_with_its_labels():
    keys = {"train": 5, "own_evaluation": 1, "common_evaluation": 2, "target_tokens": 50}
    text = shown(data_table([{"client": 0, **keys, "labels": {"a": 1, "b": 4}}, {"client": 1, **keys, "labels": {}}]))
    assert "b 4, a 1" in text and text.count("50") == 2


def test_block_table_gives_the_state_of_a_rank():
    plan = BlockPlan((Block("layers 0-1", ("x",), 2**20), Block("head", ("y",), 3 * 2**20)), ("z",))
    text = shown(block_table(plan, ranks=2, bytes_per_parameter=16))
    assert "8.0 MiB" in text and "24.0 MiB" in text and "25.0%" in text and "frozen: 1" in text


def test_a_chunk_is_split_where_weight_decay_ends():
    assert list(split_by_decay(slice(0, 10), 4, 0.1)) == [(slice(0, 4), 0.1), (slice(4, 10), 0.0)]
    assert list(split_by_decay(slice(4, 8), 4, 0.1)) == [(slice(4, 8), 0.0)]
    assert list(split_by_decay(slice(0, 4), 9, 0.1)) == [(slice(0, 4), 0.1)]
    assert list(split_by_decay(slice(0, 10), 4, 0.0)) == [(slice(0, 10), 0.0)]


def test_notes_name_whose_files_they_are_about(capsys):
    print_notes(["not used: id"])
    print_notes(["not used: id", "more"], client=3)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["data: not used: id", "data of client 3: not used: id", "data of client 3: more"]

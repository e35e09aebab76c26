import pytest
from rich.console import Console

from deca_ds.algorithm.blocks import Block, BlockPlan
from deca_ds.training.notices import print_notes, untrained, warn_of_blocks, warn_of_experts
from deca_ds.training.tables import block_table, data_table


def shown(table) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_data_table_has_a_row_per_client_with_its_labels():
    keys = {"train": 5, "dropped": 7, "cut": 33, "own_evaluation": 1, "common_evaluation": 2, "target_tokens": 5432}
    text = shown(
        data_table([{"client": 0, **keys, "labels": {"a [b]": 1, "b": 4000}}, {"client": 1, **keys, "labels": {}}])
    )
    assert "b 4,000, a [b] 1" in text and text.count("5,432") == 2
    by_hospital = shown(data_table([{"client": 0, **keys, "labels": {"north": 1}}], "hospital [x]"))
    assert "training examples by hospital [x]" in by_hospital and "label" not in by_hospital
    assert "by label" not in shown(data_table([{"client": 1, **keys, "labels": {}}]))
    assert "dropped" in text and text.count("33") == 2, "what is lost is told"


def test_block_table_gives_the_state_of_a_rank():
    plan = BlockPlan((Block("layers 0-1", ("x",), 2**20), Block("head", ("y",), 3 * 2**20)), ("z",))
    text = shown(block_table(plan, ranks=2, bytes_per_parameter=16))
    assert "8.4 MB" in text and "25.2 MB" in text and "25.0%" in text and "frozen: 1" in text


def test_what_is_frozen_and_what_is_much_larger_is_said():
    plan = BlockPlan(
        (Block("embeddings", ("x",), 90), Block("layers 0-1", ("y",), 10)), ("z", "t.a", "t.b"), ("t.a", "t.b")
    )
    rows = " ".join(shown(block_table(plan, ranks=1, bytes_per_parameter=16)).split())
    assert "frozen: 1 parameter" in rows and "frozen: 2 parameters for other input than text" in rows
    console = Console(width=300)
    with console.capture() as capture:
        warn_of_blocks(console, plan)
    said = capture.get()
    assert (
        "WARNING: block 'embeddings' holds 90%" in said and "2 parameters for other input than text (t.a, t.b)" in said
    )


@pytest.mark.parametrize(
    ("fused", "checkpointing", "warns"), [(["e"], False, True), (["e"], True, False), ([], False, False)]
)
def test_fused_experts_need_gradient_checkpointing(fused, checkpointing, warns):
    console = Console(width=300)
    with console.capture() as capture:
        warn_of_experts(console, fused, checkpointing)
    said = capture.get()
    assert (
        ("WARNING: without model.gradient_checkpointing=true, fused experts (e) stay whole" in said)
        if warns
        else not said
    )


def test_parameters_that_no_gradient_has_reached_are_named():
    said = untrained("layers 0-1", ("a", "b", "c", "d", "e"))
    assert "no gradient reached 5 parameters of block 'layers 0-1'" in said and "(a, b, c and 2 more)" in said


def test_notes_name_whose_files_they_are_about(capsys):
    print_notes(["not used: id"])
    print_notes(["not used: id", "more"], client=3)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["data: not used: id", "data of client 3: not used: id", "data of client 3: more"]

"""Tables for people: what each client got, what the blocks and the graph are, how the models scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from deca_ds.algorithm import BlockPlan
from deca_ds.plural import first_few, several
from deca_ds.printing import print_line, print_wrapped


def data_table(summaries: Sequence[dict[str, Any]], column: str | None = None) -> Group:
    """Make the table of what each client trains on, and with labels how many examples of each. summaries:
    `ClientData.summary` of every client. column: data.partition_column, whose values are counted instead of labels."""
    table = Table(title="data of each client")
    for name in ("client", "train", "dropped", "cut", "own eval", "common eval", "target tokens"):
        table.add_column(name, justify="right")
    by = column or "label"
    # beside the numbers they would be a word a line
    labels = Table(title=Text(f"training examples by {by}"), box=None)
    labels.add_column("client", justify="right")
    labels.add_column(Text(f"{by} and examples"))
    numbers = ("client", "train", "dropped", "cut", "own_evaluation", "common_evaluation", "target_tokens")
    for summary in summaries:
        table.add_row(*(f"{summary[key]:,}" for key in numbers))
        if summary["labels"]:
            counts = sorted(summary["labels"].items(), key=lambda item: -item[1])
            labels.add_row(str(summary["client"]), escape(", ".join(f"{label} {count:,}" for label, count in counts)))
    return Group(table, labels) if labels.row_count else Group(table)


def print_notes(notes: Sequence[str], client: int | None = None) -> None:
    """Print `ClientData.notes` on stderr. client: whose files they are about, if it has files of its own."""
    for note in notes:
        print_wrapped(f"data{'' if client is None else f' of client {client}'}: {note}")


def block_table(plan: BlockPlan, ranks: int, bytes_per_parameter: int) -> Table:
    """Make the table of blocks with their size and the memory of each one's state on a rank while it is active."""
    table = Table(title="blocks in model order")
    for column in ("block", "what", "parameters", "share", "state per rank"):
        table.add_column(column, justify="left" if column == "what" else "right")
    total = sum(block.numel for block in plan.blocks)
    for index, block in enumerate(plan.blocks):
        state = decimal(bytes_per_parameter * block.numel // ranks)
        table.add_row(str(index), block.label, f"{block.numel:,}", f"{block.numel / total:.1%}", state)
    if len(plan.frozen) > len(plan.beside):
        table.add_row("-", f"frozen: {several(len(plan.frozen) - len(plan.beside), 'parameter')}", "", "", "")
    if plan.beside:
        table.add_row("-", f"frozen: {several(len(plan.beside), 'parameter')} for other input than text", "", "", "")
    return table


def warn_of_blocks(console: Console, plan: BlockPlan) -> None:
    """Say which blocks are much larger than the others, and that parameters for other input than text stay frozen."""
    for warning in plan.imbalance:
        print_line(console, f"WARNING: {warning}")
    if plan.beside:
        print_line(
            console,
            f"frozen: {several(len(plan.beside), 'parameter')} for other input than text ({first_few(plan.beside, 3)})",
        )


def warn_of_experts(console: Console, fused: Sequence[str], gradient_checkpointing: bool) -> None:
    """Say that a model with fused experts needs gradient checkpointing, unless it has it. fused: their parameters.

    Autograd saves each expert's part of such a tensor, and with it the whole one, which ZeRO-3 cannot free then.
    """
    if fused and not gradient_checkpointing:
        print_line(
            console,
            f"WARNING: without model.gradient_checkpointing=true, fused experts ({first_few(fused, 3)}) stay "
            "whole on every rank between the forward and the backward pass, in all layers from the active block on",
        )


def untrained(label: str, names: Sequence[str]) -> str:
    """Name the parameters of a block that no gradient has reached in a whole activation."""
    return (
        f"no gradient reached {several(len(names), 'parameter')} of block {label!r} while it was "
        f"active ({first_few(names, 3)}): this data does not use them, and they stay as they are"
    )

"""Tables of what each client trains on, and of the blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from deca_ds.algorithm import BlockPlan
from deca_ds.plural import several


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

"""What is told of a client's data and of the blocks beside the tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from deca_ds.algorithm import BlockPlan
from deca_ds.plural import first_few, several
from deca_ds.printing import print_line, print_wrapped


def print_notes(notes: Sequence[str], client: int | None = None) -> None:
    """Print `ClientData.notes` on stderr. client: whose files they are about, if it has files of its own."""
    for note in notes:
        print_wrapped(f"data{'' if client is None else f' of client {client}'}: {note}")


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

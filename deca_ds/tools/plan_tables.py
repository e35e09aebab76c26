"""The plan's tables for people: what a rank holds."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from deca_ds.planning.estimate import Estimate, Turn
from deca_ds.planning.memory import ACTIVATIONS, MOMENTS, PASSES, Part, Place, peak


def print_memory(console: Console, estimate: Estimate) -> None:
    """What the fullest rank holds while the block is active that takes most, and what the estimate leaves out."""
    turn = estimate.worst
    console.print(memory_table(turn, estimate))
    for line in _notes(estimate):
        console.print(line, highlight=False)


def memory_table(turn: Turn, estimate: Estimate) -> Table:
    """Of one block's turn, a row a part. Memory of the GPU has a column of its own where there is one."""
    k = estimate.ranks
    table = Table(
        title=f"memory of a rank, {k} rank{'s' if k > 1 else ''} a client, block {turn.index} ({turn.label}) active",
        show_footer=True,
    )
    places: tuple[Place, ...] = ("gpu", "host") if estimate.gpu else ("host",)
    most = {where: peak(turn.parts, where) for where in places}
    table.add_column("what", "most at a time")
    table.add_column("when")
    for where in places:
        moment, size = most[where]
        table.add_column("GPU" if where == "gpu" else where, f"{decimal(size)}\n({moment})", justify="right")
    for part in turn.parts:
        table.add_row(part.name, _when(part), *(decimal(part.bytes) if part.where == at else "" for at in places))
    return table


def _when(part: Part) -> str:
    if part.when == MOMENTS:
        return "always"
    return "passes" if part.when == PASSES else part.when[0]


def _notes(estimate: Estimate) -> Iterator[str]:
    if not estimate.passes_are_known:
        yield (
            "[bold]WARNING[/bold]: activations, logits and gradients are not in the table: this model does not run on "
            "tensors without values"
        )
    kept = next((part.bytes for part in estimate.worst.parts if part.name == ACTIVATIONS), 0)
    if (other := estimate.other_activations()) is not None:
        word = "false" if estimate.config.model.gradient_checkpointing else "true"
        yield (
            f"activations: {decimal(kept)} kept for backward; model.gradient_checkpointing={word} would keep "
            f"{decimal(other)}"
        )
    where = "the CUDA allocator" if estimate.gpu else "glibc's heap"
    yield (
        f"Not in the table: what {where} keeps of freed memory (on CPUs 3 to 6 % of the peak was measured), and cached "
        "pages of the data"
    )
    if not estimate.gpu:
        yield "The table is for computing on CPUs; run.device=cuda shows it for GPUs"

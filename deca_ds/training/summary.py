"""The end of a run: a table of the scores before and after."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from deca_ds.printing import print_line
from deca_ds.training.scores import MEAN_MODEL, SETS, SHARES, Evaluation, Scores, best_of, figure


def print_summary(found: Sequence[Evaluation]) -> None:
    """Print a table of the first and the last evaluation, and which of all was the best."""
    console = Console(color_system=None, highlight=False)  # mpirun shows its ranks a terminal, also into a file
    if not found or found[-1].loss is None:
        return
    print_line(console, f"scores before and after: step {found[0].step} -> {found[-1].step}")
    console.print(_table(found[0], found[-1]))
    best = best_of(found)
    assert best is not None
    last = found[-1].step
    where = "the last one" if best.step == last else f"after step {best.step} of {last}"
    by = MEAN_MODEL if best.mean else "clients, on average" if len(best.clients) > 1 else "client"
    print_line(console, f"best evaluation: {where}; loss of the {by}: {figure('loss', best.loss or 0.0)}")


def _table(before: Evaluation, after: Evaluation) -> Table:
    sets = [name for name in SETS if any(name in each for each in after.clients.values())]
    mean_set = sets[-1]  # the common set, or the own ones pooled
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    table.add_column("model", no_wrap=True)
    columns = []
    for name in sets:
        for key in ("loss", *SHARES):
            if any(key in each.get(name, {}) for each in after.clients.values()):
                columns.append((name, key))
                table.add_column(f"{SETS[name]}\n{SHARES.get(key, key)}", justify="right", no_wrap=True)
    for client, scores in after.clients.items():
        earlier = before.clients.get(client, {})
        table.add_row(f"client {client}", *(_change(earlier.get(n, {}), scores.get(n, {}), key) for n, key in columns))
    if after.mean:
        earlier = before.mean if before.own_sets == after.own_sets else {}
        means = (_change(earlier, after.mean, key) if name == mean_set else "" for name, key in columns)
        table.add_row(MEAN_MODEL, *means)
    return table


def _change(before: Scores, after: Scores, key: str) -> str:
    return " -> ".join(figure(key, scores[key]) if key in scores else "?" for scores in (before, after))

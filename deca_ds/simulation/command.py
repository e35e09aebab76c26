"""`deca simulate`: train all clients in this process and write what happened."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from deca_ds.config import load_config
from deca_ds.config.arguments import add_config, chosen
from deca_ds.plural import several
from deca_ds.printing import print_line
from deca_ds.training.scores import MEAN_MODEL, SETS, Scores

if TYPE_CHECKING:
    from deca_ds.simulation.simulate import Simulation

SCORES = {
    "loss": "loss",
    "token_accuracy": "token accuracy",
    "exact_match": "exact match",
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `deca simulate`."""
    add_config(parser)


def run(arguments: argparse.Namespace) -> int:
    """Simulate, write run.output and print how it went. Returns the exit status. Raises UserErrors."""
    config = load_config(*chosen(arguments))  # a mistake there is told at once, before the import below

    from deca_ds.simulation.run import run_to_folder

    report(*run_to_folder(config))
    return 0


def report(simulation: Simulation, seconds: float) -> None:
    """Print a table of the evaluations, and the traffic. seconds: that the simulation took."""
    from deca_ds.training.notices import untrained

    table = Table(
        title=f"{simulation.config.algorithm.method}, {simulation.mixing.summary()}",
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False, title_justify="left",
    )  # fmt: skip
    for column in ("inner steps", "score", *SETS.values(), MEAN_MODEL, "consensus distance"):
        table.add_column(column.replace(" ", "\n"), justify="right")
    for record in simulation.evaluations:
        models = [[scores[kind] for scores in record["clients"] if kind in scores] for kind in SETS]
        models.append([record["mean"]] if record.get("mean") else [])
        step, distance = str(record["step"]), f"{record['consensus_distance']:.4g}"
        for key, name in SCORES.items():
            if key == "loss" or any(key in scores for group in models for scores in group):
                table.add_row(step, name, *(_scores(group, key) for group in models), distance)
                step = distance = ""
    console = Console()
    console.print(table)
    print_line(console, contraction(simulation))
    for label, names in simulation.untrained.items():
        print_line(console, untrained(label, names))
    sent = simulation.steps[-1]["bytes_sent"]
    print_line(
        console,
        f"{several(len(simulation.steps), 'inner step')} of {several(len(sent), 'client')} in {seconds:.1f} s; "
        f"sent by a client: {_range([each / 1e6 for each in sent])} MB",
    )


def contraction(simulation: Simulation) -> str:
    """Say what averagings did to the disagreement over the active block, beside what the spectral gap says of it."""
    averagings = [step for step in simulation.steps if step["gossip"] and step["spread_before"] > 0]
    if simulation.mixing.messages == 0 or not averagings:
        return "no averaging changed anything: the clients do not gossip, or were the same before each of them"
    factors = [step["spread_after"] / step["spread_before"] for step in averagings if step["spread_after"] > 0]
    if not factors:
        return "after every averaging all clients had the same block"
    measured = math.exp(sum(map(math.log, factors)) / len(factors))  # a period may have averagings that do nothing
    period = simulation.mixing.period
    bound = (1 - simulation.mixing.spectral_gap) ** period
    plain = "a plain averaging leaves" if period == 1 else f"{period} plain averagings leave"  # one alone may leave all
    return (
        f"an averaging left {measured:.1%} of the distance between the clients' models; by theory {plain} at most "
        f"{bound:.1%}"
    )


def _scores(models: Sequence[Scores], key: str) -> str:
    found = [scores[key] for scores in models if key in scores]
    if not found:
        return "-"
    return _range(found) if key == "loss" else f"{_range([100 * share for share in found], digits=1)} %"


def _range(values: Sequence[float], digits: int = 4) -> str:
    low, high = min(values), max(values)
    return f"{low:.{digits}f}" if low == high else f"{low:.{digits}f} to {high:.{digits}f}"

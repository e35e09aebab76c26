"""Tables and plots of the ablation, from its raw runs.

python examples/ablation/report.py             benchmarks/ablation/tables.md and plots
python examples/ablation/report.py --no-plots  tables only; needs no matplotlib
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ablation import RESULTS, finished, load_studies
from summary import (
    Interval,
    Measure,
    Row,
    clients_loss,
    clients_mean,
    difference,
    gap_closed,
    mean_model,
    pairs_without_signal,
    summarize,
)

HEAD = """# The ablation's tables

    python examples/ablation/report.py

made this file from runs.jsonl; what the studies are is in examples/ablation/studies.yaml. Losses are nats per target
token on the common evaluation set, after the last step: the mean over the clients, and that of the mean model. Every
row has its own best learning rate, found on seed 0 by the clients' loss; seed 0 is one of the reported seeds. +- is the
half-width of a 95 % interval over the seeds (Student's t; three seeds, so it is wide). "against the first" is the row
minus the first one, seed by seed, with the same data and order; bold where the interval excludes 0. No correction is
made for the number of comparisons: of twenty true zeros, one would be bold. A learning rate with a * is the smallest or
the largest that was tried, after extensions of the grid: the row could be better yet. Contraction is what an averaging
leaves of the clients' disagreement; the bound is 1 - spectral gap (of one-peer exponential: of a period's averagings,
which make an exact mean together).
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the ablation's tables and plots from its runs.")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--no-plots", action="store_true")
    arguments = parser.parse_args()
    studies = list(summarize(load_studies(), finished(arguments.results / "runs.jsonl")))
    (arguments.results / "tables.md").write_text(tables(studies))
    if not arguments.no_plots:
        from plots import draw

        draw(studies, arguments.results)


def tables(studies: Sequence[tuple[str, str, list[Row]]]) -> str:
    """All tables as Markdown."""
    runs = {run["key"]: run["cpu_seconds"] for _, _, rows in studies for row in rows for run in row.runs}
    parts = [HEAD, f"{len(runs)} runs at the tuned learning rates took {sum(runs.values()) / 3600:.1f} CPU hours.\n"]
    parts.append(_signal_table(studies))
    for study, dataset, rows in studies:
        parts.append(f"## {study}, {dataset}\n\n" + _table(rows))
    return "\n".join(parts)


def _signal_table(studies: Sequence[tuple[str, str, list[Row]]]) -> str:
    """DECA's default signal against none, in every setting that has both."""
    lines = ["## The signal: gossip-adam minus deca (descent), in every setting that has both", ""]
    lines += [
        "| study | data | setting | clients' loss | seeds where deca is lower | mean model's loss |",
        "|---" * 6 + "|",
    ]
    for study, dataset, deca, without in pairs_without_signal(studies):
        values = zip(without.values(clients_loss), deca.values(clients_loss), strict=True)
        lower = sum(a > b for a, b in values)
        scores = (
            _difference(without, deca),
            f"{lower} of {len(deca.runs)}",
            _difference(without, deca, mean_model("loss")),
        )
        lines.append(f"| {study} | {dataset} | {deca.name} | {' | '.join(scores)} |")
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Row]) -> str:
    scored = any(row.values(clients_mean("accuracy")) for row in rows)
    closes = any(gap_closed(row, rows, clients_loss) for row in rows)
    columns = ["", "lr", "steps", "samples a client", "MB sent a client", "clients' loss", "against the first"]
    columns += ["mean model", "consensus distance", "contraction: bound, measured"]
    columns += ["clients' accuracy, %", "macro-F1, %", "mean model's accuracy, %"] if scored else []
    columns += ["share of the gap closed: loss"] + (["accuracy"] if scored else []) if closes else []
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    for row in rows:
        cells = _cells(row, rows, scored, closes) if row.runs else ["not run"]
        cells += [""] * (len(columns) - 1 - len(cells))
        lines.append(f"| {' | '.join([row.name, *cells])} |")
    return "\n".join(lines) + "\n"


def _cells(row: Row, rows: Sequence[Row], scored: bool, closes: bool) -> list[str]:
    first = row.runs[0]
    if not all(run["loss"] is not None for run in row.runs):
        return [f"{row.lr:g}", "diverged at every learning rate"]
    samples = first["steps"] * row.variant.keys["data.batch_size"]
    gossips = first["contraction"] is not None and first["bytes_sent_by_a_client"] > 0
    cells = [
        f"{row.lr:g}" + ("*" if row.at_the_end else ""),
        str(first["steps"]),
        str(samples),
        f"{first['bytes_sent_by_a_client'] / 1e6:.0f}",
    ]
    cells += [_shown(row.interval(clients_loss)), _difference(row, rows[0]), _shown(row.interval(mean_model("loss")))]
    cells += [_shown(row.interval(lambda run: run["consensus_distance"]), digits=2)]
    cells += [f"{1 - first['spectral_gap']:.3f}, {first['contraction']:.3f}" if gossips else ""]
    if scored:
        for measure in (clients_mean("accuracy"), clients_mean("macro_f1"), mean_model("accuracy")):
            cells.append(_shown(row.interval(measure), digits=1, scale=100))
    if closes:
        cells.append(_shown(gap_closed(row, rows, clients_loss), digits=2))
        if scored:
            cells.append(_shown(gap_closed(row, rows, clients_mean("accuracy")), digits=2))
    return cells


def _difference(row: Row, reference: Row, measure: Measure = clients_loss) -> str:
    if row is reference:
        return ""
    interval = difference(row, reference, measure)
    text = _shown(interval, sign=True)
    return f"**{text}**" if interval is not None and interval.excludes_zero else text


def _shown(interval: Interval | None, *, digits: int = 3, scale: float = 1, sign: bool = False) -> str:
    if interval is None:
        return ""
    mean = f"{interval.mean * scale:{'+' if sign else ''}.{digits}f}"
    return mean if interval.half is None else f"{mean} +- {interval.half * scale:.{digits}f}"


if __name__ == "__main__":
    main()

"""Tables and plots of the ablation, from its raw runs.

python examples/ablation/report.py                      benchmarks/ablation/tables.md and plots
python examples/ablation/report.py --no-plots           tables only; needs no matplotlib
python examples/ablation/report.py --studies learnable  benchmarks/learnable/tables.md
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ablation import BENCHMARKS, STUDIES, finished, load_studies
from summary import (
    Interval,
    Measure,
    Row,
    Run,
    Studies,
    agreeing,
    clients_loss,
    clients_mean,
    difference,
    differences,
    gap_closed,
    mean_model,
    pairs_without_signal,
    summarize,
)

HEAD = """# The tables of the studies {name}

    python examples/ablation/report.py --studies {name}

made this file from runs.jsonl; what the studies are is in examples/ablation/{name}.yaml. Losses are nats per target
token on the common evaluation set, after the last step: the mean over the clients, and that of the mean model. Every
row has its own best learning rate, found on seed {tuned} by the clients' loss; seeds {seeds} are reported, on the same
set. +- is the half-width of a 95 % interval over these seeds (Student's t: with few seeds it is wide). "against the
first" is the row minus the first one, seed by seed: the same common set, graph and (but where the study changes alpha)
split of the data; bold where the interval excludes 0. "same sign" counts the seeds whose difference has the sign of the
mean difference. No correction is made for the number of comparisons: of twenty true zeros, one would be bold. A
learning rate with a * is the smallest or the largest that was tried, after extensions of the grid: the row could be
better yet.

A seed draws its own Erdos-Renyi graph, so MB sent and contraction are means over the seeds. Contraction is what an
averaging leaves of the clients' disagreement; the bound is 1 - spectral gap, for graphs that stay the same (a period
of one-peer exponential makes an exact mean, its single averagings have no such bound). The share of the gap closed is
(local - x) / (local - central), local: "adamw, alone", central: "adamw, all data", for block-wise methods too.
"""


ORDERING = ("deca (descent)", "gossip-adam, per block", "deca (trivial)")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the ablation's tables and plots from its runs.")
    parser.add_argument("--studies", choices=STUDIES, default=STUDIES[0])
    parser.add_argument("--results", type=Path, help="default: benchmarks/STUDIES")
    parser.add_argument("--no-plots", action="store_true")
    arguments = parser.parse_args()
    results = arguments.results or BENCHMARKS / arguments.studies
    if not (results / "runs.jsonl").is_file():
        parser.error(f"there are no runs in {results}: ablation.py --studies {arguments.studies} makes them")
    runs, wanted = finished(results / "runs.jsonl"), load_studies(arguments.studies)
    studies = list(summarize(wanted, runs))
    (results / "tables.md").write_text(head(arguments.studies, wanted["tune"]) + tables(studies, runs))
    if not arguments.no_plots:
        from plots import draw

        draw(studies, results)


def head(name: str, tune: Mapping[str, Any]) -> str:
    """What the tables say. name: of the file of studies. tune: its part of that name."""
    return HEAD.format(name=name, tuned=tune["tuning_seed"], seeds=", ".join(map(str, tune["seeds"]))) + "\n"


def tables(studies: Studies, runs: Mapping[str, Run]) -> str:
    """All tables as Markdown. runs: everything on record, by key; what no row asks for any more counts as cost only."""
    reported = {run["key"] for _, _, rows in studies for row in rows for run in row.runs}
    hours = sum(run["cpu_seconds"] for run in runs.values()) / 3600
    cost = f"{len(runs)} runs took {hours:.1f} CPU hours; {len(reported)} of them are reported, the others tuned.\n"
    parts = [cost, _ordering_table(studies), _signal_table(studies)]
    for study, dataset, rows in studies:
        parts.append(f"## {study}, {dataset}\n\n" + _table(rows))
    return "\n".join(parts)


def _ordering_table(studies: Studies) -> str:
    """The paper's ordering, where all three have run: the loss that each step down the ordering adds."""
    lines = ["## The paper's ordering: DECA, no BMA, trivial BMA", ""]
    lines += ["| study | data | no BMA minus DECA | trivial minus no BMA | trivial minus DECA |", "|---" * 5 + "|"]
    for study, dataset, rows in studies:
        named = {row.name: row for row in rows if row.runs}
        if not named.keys() >= set(ORDERING):
            continue
        deca, without, trivial = (named[name] for name in ORDERING)
        steps = (_difference(without, deca), _difference(trivial, without), _difference(trivial, deca))
        lines.append(f"| {study} | {dataset} | {' | '.join(steps)} |")
    return "\n".join(lines) + "\n"


def _signal_table(studies: Studies) -> str:
    """DECA's default signal against none, in every setting that has both."""
    lines = ["## The signal: gossip-adam minus deca (descent), in every setting that has both", ""]
    lines += [
        "| study | data | setting | clients' loss | seeds where deca is lower | mean model's loss |",
        "|---" * 6 + "|",
    ]
    for study, dataset, deca, without in pairs_without_signal(studies):
        values = differences(without, deca)
        lower = f"{sum(value > 0 for value in values)} of {len(values)}" if any(values) else "the same bits"
        scores = (_difference(without, deca), lower, _difference(without, deca, mean_model("loss")))
        lines.append(f"| {study} | {dataset} | {deca.name} | {' | '.join(scores)} |")
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Row]) -> str:
    scored = any(row.values(clients_mean("accuracy")) for row in rows)
    closes = any(gap_closed(row, rows, clients_loss) for row in rows)
    columns = ["", "lr", "steps", "samples a client", "MB sent a client", "clients' loss", "against the first"]
    columns += ["same sign"]
    columns += ["mean model", "consensus distance", "contraction: bound, measured"]
    columns += ["clients' accuracy, %", "macro-F1, %", "mean model's accuracy, %"] if scored else []
    columns += ["share of the gap closed: loss"] + (["accuracy"] if scored else []) if closes else []
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    for row in rows:
        unfinished = "not finished" if row.tried else "not run"
        cells = _cells(row, rows, scored, closes) if row.runs else [unfinished]
        cells += [""] * (len(columns) - 1 - len(cells))
        lines.append(f"| {' | '.join([row.name, *cells])} |")
    return "\n".join(lines) + "\n"


def _cells(row: Row, rows: Sequence[Row], scored: bool, closes: bool) -> list[str]:
    if row.diverged:
        at = (
            "every learning rate" if math.isinf(min(row.tried.values())) else f"{row.diverged} of {len(row.runs)} seeds"
        )
        return [f"{row.lr:g}", f"diverged at {at}"]
    steps, sent, contraction = row.runs[0]["steps"], row.average("bytes_sent_by_a_client"), row.average("contraction")
    changes = differences(row, rows[0]) if row is not rows[0] else []
    cells = [
        f"{row.lr:g}" + ("*" if row.at_the_end else ""),
        str(steps),
        str(steps * row.variant.keys["data.batch_size"]),
        f"{sent / 1e6:.0f}",
        _shown(row.interval(clients_loss)),
        _difference(row, rows[0]),
        f"{agreeing(changes)} of {len(changes)}" if any(changes) else "the same bits" if changes else "",
        _shown(row.interval(mean_model("loss"))),
        _shown(row.interval(lambda run: run["consensus_distance"]), digits=2),
    ]
    bound = "-" if row.bound is None else f"{row.bound:.3f}"
    cells += [f"{bound}, {contraction:.3f}" if contraction is not None and sent else ""]
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

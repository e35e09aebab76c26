"""Tables and plots of the ablation, from its raw runs.

python examples/ablation/report.py                      benchmarks/ablation/tables.md and plots
python examples/ablation/report.py --no-plots           tables only; needs no matplotlib
python examples/ablation/report.py --studies learnable  benchmarks/learnable/tables.md, and the table in README.md there
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from ablation import BENCHMARKS, STUDIES, finished, load_studies
from summary import (
    CENTRAL,
    LOCAL,
    Interval,
    Measure,
    Row,
    Run,
    Studies,
    agreeing,
    clients_loss,
    clients_mean,
    corrected,
    differences,
    gap_closed,
    mean_model,
    pairs_without_signal,
    summarize,
)

HEAD = """# The tables of the studies {name}

```bash no test
python examples/ablation/report.py --studies {name}
```

made this file from runs.jsonl; what the studies are is in examples/ablation/{name}.yaml. Losses are nats per target
token on the common evaluation set, after the last step: the mean over the clients, and that of the mean model. Every
row has its own best learning rate, found on seed {tuned} by the clients' loss; seeds {seeds} are reported. +- is the
half-width of a 95 % interval over these seeds (Student's t: with few seeds it is wide). "against the first" is the
row minus the first one, seed by seed: the same common set, graph and (but where the study changes alpha) split of the
data. p is that of the paired t test, corrected for the number of rows that are compared in its table, run or not
(Holm): bold where it is below 0.05. The intervals are not corrected. "same sign" counts the seeds whose difference
has the sign of the mean difference. A learning rate with a * is the smallest or the largest that was tried, after
extensions of the grid: the row could be better yet. State: masters, gradient and what the method keeps, of the
largest block, in float32.

A seed draws its own Erdos-Renyi graph, so MB sent and contraction are means over the seeds. Contraction is what an
averaging leaves of the clients' disagreement; the bound is 1 - spectral gap, for graphs that stay the same (a period
of one-peer exponential makes an exact mean, its single averagings have no such bound). The share of the gap closed is
(local - x) / (local - central), local: "adamw, alone", central: "adamw, all data", for block-wise methods too.
"""


PAGE, FIRST = BENCHMARKS / "learnable" / "README.md", "methods, ring"  # the study whose table stands there
SCREEN = """
Each method at its own best learning rate. +- is a 95 % interval over the seeds; bold differs from DECA with p < 0.05,
corrected for the number of methods. MB: what a client sends, and keeps while it trains.

![Accuracy of each method, between clients alone and all data](accuracy.png)

{table}
"""
MARKS = ("<!-- accuracies, by examples/ablation/report.py -->", "<!-- end of accuracies -->")
LEVEL = 0.05
SHARES = {"accuracy": "accuracy", "exact_match": "exact matches"}  # score -> its name in a table
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
    (results / "tables.md").write_text(head(arguments.studies, wanted) + tables(studies, runs))
    if results == BENCHMARKS / "learnable":
        PAGE.write_text(between_marks(PAGE.read_text(), first_table(studies)))
    if not arguments.no_plots:
        from plots import draw

        draw(studies, results)


def between_marks(page: str, text: str) -> str:
    """The page with that text in its place."""
    before, _, rest = page.partition(f"{MARKS[0]}\n")
    _, _, after = rest.partition(f"{MARKS[1]}\n")
    return f"{before}{MARKS[0]}\n{text}{MARKS[1]}\n{after}"


def head(name: str, wanted: Mapping[str, Any]) -> str:
    """What the tables say. name: of the file of studies. wanted: its content."""
    tune = wanted["tune"]
    by_seeds = defaultdict(list)
    for study, content in wanted["studies"].items():
        if "seeds" in content:
            by_seeds[_listed(content["seeds"])].append(f"`{study}`")
    own = [
        fill(f"The seeds {seeds} are those of {', '.join(names)}, at the same learning rates.", 120) + "\n"
        for seeds, names in by_seeds.items()
    ]
    return "\n".join([HEAD.format(name=name, tuned=tune["tuning_seed"], seeds=_listed(tune["seeds"])), *own, ""])


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def tables(studies: Studies, runs: Mapping[str, Run]) -> str:
    """All tables as Markdown. runs: everything on record, by key; what no row asks for any more counts as cost only."""
    reported = {run["key"] for _, _, rows in studies for row in rows for run in row.runs}
    hours = sum(run["cpu_seconds"] for run in runs.values()) / 3600
    cost = f"{len(runs)} runs took {hours:.1f} CPU hours; {len(reported)} of them are reported, the others tuned.\n"
    parts = [cost, _ordering_table(studies), _signal_table(studies)]
    for study, dataset, rows in studies:
        parts.append(f"## {study}, {dataset}\n\n" + _table(rows))
    return "\n".join(filter(None, parts))


def _ordering_table(studies: Studies) -> str:
    """The paper's ordering, where all three have run: what each step down the ordering adds."""
    lines = ["## The paper's ordering: DECA, no BMA, trivial BMA", ""]
    lines += [
        "| study | data | score | no BMA minus DECA | trivial minus no BMA | trivial minus DECA |",
        "|---" * 6 + "|",
    ]
    settings = []
    for study, dataset, rows in studies:
        named = {row.name: row for row in rows if row.runs}
        if named.keys() >= set(ORDERING):
            deca, without, trivial = (named[name] for name in ORDERING)
            settings.append((study, dataset, ((without, deca), (trivial, without), (trivial, deca))))
    if not settings:
        return ""
    for score, measure, scale in (("loss", clients_loss, 1), ("accuracy, points", clients_mean("accuracy"), 100)):
        changes = [[differences(row, other, measure) for row, other in pairs] for *_, pairs in settings]
        columns = [_differences(column, scale) for column in zip(*changes, strict=True)]
        for (study, dataset, _), *steps in zip(settings, *columns, strict=True):
            if any(steps):
                lines.append(f"| {' | '.join([study, dataset, score, *steps])} |")
    return "\n".join(lines) + "\n"


def _signal_table(studies: Studies) -> str:
    """DECA's default signal against none, in every setting that has both."""
    pairs = list(pairs_without_signal(studies))
    if not pairs:
        return ""
    lines = ["## The signal: gossip-adam minus deca (descent), in every setting that has both", ""]
    titles = ("clients' loss", "clients' accuracy, points", "mean model's loss", "seeds where deca's loss is lower")
    lines += [f"| study | data | setting | {' | '.join(titles)} |", "|---" * 7 + "|"]
    columns = []
    for measure, scale in ((clients_loss, 1), (clients_mean("accuracy"), 100), (mean_model("loss"), 1)):
        columns.append(_differences([differences(without, deca, measure) for *_, deca, without in pairs], scale))
    for (study, dataset, deca, without), *scores in zip(pairs, *columns, strict=True):
        values = differences(without, deca)
        lower = f"{sum(value > 0 for value in values)} of {len(values)}" if any(values) else "the same bits"
        lines.append(f"| {' | '.join([study, dataset, deca.name, *scores, lower])} |")
    return "\n".join(lines) + "\n"


def first_table(studies: Studies) -> str:
    """What PAGE shows of FIRST: how often the clients answer rightly, and what it costs. Empty until DECA and both
    brackets are done; other rows follow as they are."""
    rows = next((rows for study, _, rows in studies if study == FIRST), [])
    done = [place for place, row in enumerate(rows) if row.runs]
    if not {ORDERING[0], LOCAL, CENTRAL} <= {rows[place].name for place in done}:
        return ""
    accuracy, losses = _share_columns(rows), _loss_columns(rows)
    columns = {
        "accuracy of the clients, %": accuracy["clients' accuracy, %"],
        "minus DECA's, points": accuracy["against the first, points"],
        "of their mean model, %": accuracy["mean model's accuracy, %"],
        "share of the gap closed": accuracy["share of the gap closed"],
        "MB sent": losses["MB sent a client"],
        "MB state": losses["state, MB"],
    }
    columns = {name: [cells[place] for place in done] for name, cells in columns.items()}
    return SCREEN.format(table=_markdown([rows[place] for place in done], columns))


def _table(rows: Sequence[Row]) -> str:
    """Cost and loss; below it, where answers are right or wrong, who answers how often rightly."""
    losses = {name: cells for name, cells in _loss_columns(rows).items() if any(cells)}
    parts = [_markdown(rows, losses)]
    for key, name in SHARES.items():
        shares = {title: cells for title, cells in _share_columns(rows, key, name).items() if any(cells)}
        parts += [_markdown(rows, shares)] if shares else []
    return "\n".join(parts)


def _markdown(rows: Sequence[Row], columns: Mapping[str, Sequence[str]]) -> str:
    columns = columns or {"so far": [""] * len(rows)}
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for place, row in enumerate(rows):
        cells = [column[place] for column in columns.values()]
        if not row.runs:
            cells = ["not finished" if row.tried else "not run", *[""] * (len(cells) - 1)]
        elif row.diverged:
            every = math.isinf(min(row.tried.values()))
            at = "every learning rate" if every else f"{row.diverged} of {len(row.runs)} seeds"
            cells = [f"{row.lr:g}, diverged at {at}", *[""] * (len(cells) - 1)]
        lines.append(f"| {' | '.join([row.name, *cells])} |")
    return "\n".join(lines) + "\n"


def _loss_columns(rows: Sequence[Row]) -> dict[str, list[str]]:
    changes = [_changes(row, rows[0]) for row in rows]
    steps = [row.runs[0]["steps"] if row.runs else 0 for row in rows]
    return {
        "lr": ["" if row.lr is None else f"{row.lr:g}" + ("*" if row.at_the_end else "") for row in rows],
        "steps": [str(n or "") for n in steps],
        "samples a client": [
            str(n * row.variant.keys["data.batch_size"]) if n else "" for n, row in zip(steps, rows, strict=True)
        ],
        "MB sent a client": [_average(row, "bytes_sent_by_a_client", 1e-6) for row in rows],
        "state, MB": [_average(row, "state_bytes", 1e-6, digits=1) for row in rows],
        "clients' loss": _column(rows, clients_loss),
        "against the first": _differences(changes, planned=len(rows) - 1),
        "p": _p_values(changes, planned=len(rows) - 1),
        "same sign": [_signs(each) for each in changes],
        "mean model": _column(rows, mean_model("loss")),
        "consensus distance": _column(rows, lambda run: run["consensus_distance"], digits=2),
        "contraction: bound, measured": [_contraction(row) for row in rows],
        "share of the gap closed": [_shown(gap_closed(row, rows, clients_loss), digits=2) for row in rows],
    }


def _share_columns(rows: Sequence[Row], key: str = "accuracy", name: str = "accuracy") -> dict[str, list[str]]:
    """Of a score that is a share of the examples. key, name: see SHARES."""
    share = clients_mean(key)
    changes = [_changes(row, rows[0], share) for row in rows]
    macro_f1 = {"macro-F1, %": _column(rows, clients_mean("macro_f1"), digits=1, scale=100)}
    return {
        f"clients' {name}, %": _column(rows, share, digits=1, scale=100),
        "against the first, points": _differences(changes, scale=100, planned=len(rows) - 1),
        "p": _p_values(changes, planned=len(rows) - 1),
        **(macro_f1 if key == "accuracy" else {}),
        f"mean model's {name}, %": _column(rows, mean_model(key), digits=1, scale=100),
        "share of the gap closed": [_shown(gap_closed(row, rows, share), digits=2) for row in rows],
    }


def _changes(row: Row, first: Row, measure: Measure = clients_loss) -> list[float]:
    return [] if row is first else differences(row, first, measure)


def _column(rows: Sequence[Row], measure: Measure, *, digits: int = 3, scale: float = 1) -> list[str]:
    return [_shown(row.interval(measure), digits=digits, scale=scale) for row in rows]


def _differences(changes: Sequence[Sequence[float]], scale: float = 1, planned: int = 0) -> list[str]:
    """An interval for each comparison of a column, bold where its corrected p is below 0.05."""
    digits = 1 if scale == 100 else 3
    cells = []
    for values, p in zip(changes, corrected(changes, planned), strict=True):
        text = _shown(Interval.of(values) if values else None, sign=True, digits=digits, scale=scale)
        cells.append(f"**{text}**" if p is not None and p < LEVEL else text)
    return cells


def _p_values(changes: Sequence[Sequence[float]], planned: int) -> list[str]:
    return ["" if p is None else f"{p:.3f}" if p >= 0.001 else "< 0.001" for p in corrected(changes, planned)]


def _signs(values: Sequence[float]) -> str:
    return f"{agreeing(values)} of {len(values)}" if any(values) else "the same bits" if values else ""


def _average(row: Row, key: str, scale: float, digits: int = 0) -> str:
    value = row.average(key)
    return "" if value is None else f"{value * scale:.{digits}f}"


def _contraction(row: Row) -> str:
    measured = row.average("contraction")
    if measured is None or not row.average("bytes_sent_by_a_client"):
        return ""
    return f"{'-' if row.bound is None else f'{row.bound:.3f}'}, {measured:.3f}"


def _shown(interval: Interval | None, *, digits: int = 3, scale: float = 1, sign: bool = False) -> str:
    if interval is None:
        return ""
    mean = f"{interval.mean * scale:{'+' if sign else ''}.{digits}f}"
    return mean if interval.half is None else f"{mean} +- {interval.half * scale:.{digits}f}"


if __name__ == "__main__":
    main()

"""The ablation's figures: dots with 95 % intervals over the seeds, beside the tables."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from summary import CENTRAL, LOCAL, Measure, Row, Studies, clients_loss, clients_mean, mean_model

try:
    import matplotlib

    matplotlib.use("agg")  # files only; no display is needed
    from matplotlib import pyplot as plt
    from matplotlib.axes import Axes
except ImportError as error:
    raise SystemExit("ERROR: plots need matplotlib: pip install -e '.[plots]', or use --no-plots") from error

LOSS = "clients' loss on the common set, nats per token"
SENT = "bytes_sent_by_a_client"
METHODS = ("deca", "gossip-adam")  # what curves compare


def draw(studies: Studies, folder: Path) -> list[Path]:
    """Write a PNG for every study that has run as far as its figure needs; returns the files."""
    plt.rcParams.update(
        {"figure.dpi": 120, "font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "savefig.bbox": "tight"}
    )
    found = {
        (study, dataset): [row for row in rows if row.runs and math.isfinite(_mean(row))]
        for study, dataset, rows in studies
    }
    written = []
    for study in ("methods", "signal", "blocks", "quality"):
        panels = {dataset: rows for (name, dataset), rows in found.items() if name == study and len(rows) > 1}
        if panels:
            written.append(_dots(study, panels, folder))
    curves: list[tuple[str, str, Callable[[Row], float]]] = [
        ("heterogeneity", "Dirichlet alpha (small: each client sees few labels)", _number("alpha")),
        ("rounds", "R, inner steps of a block's activation (192 steps in all)", _number("R =")),
        ("every", "s, inner steps an averaging", _number("s =")),
    ]
    for study, label, place in curves:
        rows = found.get((study, "news"), [])
        if len(rows) > 2:
            written.append(_curves(study, rows, label, place, folder))
    ring = found.get(("methods, ring", "news"), [])
    if {LOCAL, CENTRAL} < {row.name for row in ring}:
        written.append(_accuracies(ring, folder / "accuracy.png"))
    if len(found.get(("graphs", "news"), [])) > 2:
        written.append(_graphs(found[("graphs", "news")], folder))
    if any(len(found.get(("traffic", dataset), [])) > 1 for dataset in ("news", "tasks")):
        written.append(_traffic(found, folder))
    if (folder / "moments.json").is_file():
        written.append(_moments(json.loads((folder / "moments.json").read_text()), folder))
    return written


MEANINGS = {  # of the columns that moments.py finds; a method without one of them has zeros there
    "|h| / |g|": "size of the signal h / size of the gradient",
    "h along g": "cosine of h with the clients' mean gradient",
    "h in v": "share of h*h in the second moment",
    "m along g": "cosine of the first moment with that gradient",
    "step": "step, in learning rates",
    "pulled": "averaging's change / step",
}


def _moments(found: dict[str, Any], folder: Path) -> Path:
    """A panel a column of moments.py, over the inner steps of a block's activation."""
    figure, axes = plt.subplots(2, 3, figsize=(10.4, 5.2), sharex=True, layout="constrained")
    for place, (axis, column) in enumerate(zip(axes.flat, found["columns"], strict=True)):
        for index, (name, rows) in enumerate(found["methods"].items()):
            values = [row[place] for row in rows]
            if any(values) and not (column == "h in v" and name == "no signal"):  # there h enters nothing
                axis.plot(range(1, len(rows) + 1), values, "o-", ms=3, color=f"C{index}", label=name)
        axis.set_title(MEANINGS[column], fontsize=9)
        axis.set_ylim(bottom=0)
    for axis in axes[1]:
        axis.set_xlabel("inner step since the block became active")
    figure.legend(*axes.flat[-1].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return _save(figure, folder / "moments.png")


def _graphs(rows: list[Row], folder: Path) -> Path:
    """Loss and contraction for each graph, in the order of the spectral gap."""
    figure, (losses, factors) = plt.subplots(1, 2, figsize=(10.4, 3.4), layout="constrained")
    gap = {row.name.partition(", ")[2]: (row.bound is not None, row.average("spectral_gap")) for row in rows}
    order = sorted(gap, key=lambda graph: (gap[graph][1], gap[graph][0]))
    for index, method in enumerate(METHODS):
        shift = 0.12 * (2 * index - 1)
        for row in (row for row in rows if row.name.startswith(f"{method},")):
            place = order.index(row.name.partition(", ")[2])
            _point(losses, place + shift, _mean(row), row, across=False, color=f"C{index}")
            factors.plot(place + shift, row.average("contraction"), "o", ms=5, color=f"C{index}")
            if row.bound is not None and index == 0:
                factors.plot([place - 0.3, place + 0.3], [row.bound] * 2, color="0.3")
        losses.plot([], [], "o", color=f"C{index}", label=method)
        factors.plot([], [], "o", color=f"C{index}", label=f"{method}, measured")
    factors.plot([], [], color="0.3", label="bound: 1 - spectral gap")
    labels = [f"{graph}\ngap {gap[graph][1]:.2f}{'' if gap[graph][0] else ' (a period)'}" for graph in order]
    for axis, text in ((losses, LOSS), (factors, "contraction of an averaging")):
        axis.set_xticks(range(len(order)), [label.replace("one_peer_", "one_peer_\n") for label in labels])
        axis.set_ylabel(text)
        axis.legend()
    return _save(figure, folder / "graphs.png")


def _traffic(found: dict[tuple[str, str], list[Row]], folder: Path) -> Path:
    """Loss against what a client sends; those that send nothing are lines across."""
    figure, axes = plt.subplots(1, 2, figsize=(12.4, 4.2), sharex=True, layout="constrained")
    rows = {data: found.get(("methods", data), []) + found.get(("traffic", data), [])[1:] for data in ("news", "tasks")}
    names = list(dict.fromkeys(row.name for each in rows.values() for row in each if row.average(SENT)))
    for axis, (dataset, each) in zip(axes, rows.items(), strict=True):
        groups: dict[float, list[Row]] = {}
        for row in each:
            if row.name in (LOCAL, CENTRAL):
                axis.axhline(_mean(row), color="0.5", linestyle="--" if row.name == LOCAL else ":")
            elif sent := row.average(SENT):
                groups.setdefault(round(sent / 1e6), []).append(row)
        for sent, group in groups.items():
            for place, row in enumerate(group):
                at = sent * 1.035 ** (place - (len(group) - 1) / 2)  # so that intervals do not hide each other
                index = names.index(row.name)
                _point(axis, at, _mean(row), row, across=False, color=f"C{index % 10}", marker="os"[index // 10])
        axis.set_xscale("log")
        ticks = [100, 200, 400, 800]
        axis.set_xlim(90, 900)
        axis.set_xticks(ticks, map(str, ticks))
        axis.minorticks_off()
        axis.set_title(dataset)
        axis.set_xlabel("MB that a client sends (dots side by side: the same)")
        axis.set_ylabel(LOSS)
    for index, name in enumerate(names):
        axes[1].plot([], [], "os"[index // 10], color=f"C{index % 10}", label=name)
    axes[1].plot([], [], color="0.5", linestyle="--", label=LOCAL)
    axes[1].plot([], [], color="0.5", linestyle=":", label=CENTRAL)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside right upper")
    return _save(figure, folder / "traffic.png")


def _accuracies(rows: list[Row], path: Path) -> Path:
    """A line a method, the best at the top, between its brackets: the clients' accuracy and their mean model's, and
    what it costs."""
    accuracy = clients_mean("accuracy")
    named = {row.name: row for row in rows}
    ranked = sorted((row for row in rows if row.name not in (LOCAL, CENTRAL)), key=lambda row: _mean(row, accuracy))
    figure, axis = plt.subplots(figsize=(8.6, 1.3 + 0.3 * len(ranked)), layout="constrained")
    for name, style in ((LOCAL, "--"), (CENTRAL, ":")):
        axis.axvline(100 * _mean(named[name], accuracy), color="0.3", linestyle=style, label=name)
    for place, row in enumerate(ranked):
        interval = row.interval(accuracy)
        assert interval is not None
        half = None if interval.half is None else 100 * interval.half
        color = "C3" if row.name.startswith("deca") else "C0"
        axis.errorbar(100 * interval.mean, place, xerr=half, fmt="o", ms=5, capsize=2, color=color, zorder=3)
        axis.scatter([100 * value for value in row.values(accuracy)], [place] * len(row.runs), s=6, color="0.6")
        axis.plot(100 * _mean(row, mean_model("accuracy")), place, "D", ms=5, mfc="none", color=color)
        cost = f"{(row.average(SENT) or 0) / 1e6:.0f} MB sent, {(row.average('state_bytes') or 0) / 1e6:.0f} MB state"
        axis.annotate(cost, (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=8, color="0.3")
    axis.plot([], [], "o", color="0.4", label="clients, mean and 95 % interval over seeds")
    axis.plot([], [], "D", mfc="none", color="0.4", label="their mean model")
    axis.set_yticks(range(len(ranked)), [row.name for row in ranked])
    axis.set_ylim(-0.6, len(ranked) - 0.4)
    axis.set_xlabel("accuracy on the common set, %")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return _save(figure, path)


def _dots(study: str, panels: dict[str, list[Row]], folder: Path) -> Path:
    """A line a variant, the best at the top."""
    height = 1.0 + 0.28 * max(map(len, panels.values()))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(6.4 * len(panels), height), squeeze=False, layout="constrained"
    )
    for axis, (dataset, rows) in zip(axes[0], panels.items(), strict=True):
        ranked = sorted(rows, key=lambda row: -_mean(row))
        for place, row in enumerate(ranked):
            _point(axis, _mean(row), place, row, across=True)
            axis.scatter([clients_loss(run) for run in row.runs], [place] * len(row.runs), s=6, color="0.6", zorder=1)
        axis.set_ylim(-0.6, len(ranked) - 0.4)
        axis.set_yticks(range(len(ranked)), [row.name for row in ranked])
        axis.set_title(dataset)
        axis.set_xlabel(LOSS)
    return _save(figure, folder / f"{study}.png")


def _curves(study: str, rows: list[Row], label: str, place: Callable[[Row], float], folder: Path) -> Path:
    figure, axis = plt.subplots(figsize=(5.2, 3.4), layout="constrained")
    for index, method in enumerate(METHODS):
        mine = sorted((row for row in rows if row.name.startswith(method)), key=place)
        shift = 1 + 0.02 * (2 * index - 1)  # so that intervals do not hide each other
        axis.plot([place(row) * shift for row in mine], [_mean(row) for row in mine], color=f"C{index}", label=method)
        for row in mine:
            _point(axis, place(row) * shift, _mean(row), row, across=False, color=f"C{index}")
    axis.set_xscale("log")
    ticks = sorted({place(row) for row in rows})
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel(label)
    axis.set_ylabel(LOSS)
    axis.legend()
    return _save(figure, folder / f"{study}.png")


def _point(axis: Axes, x: float, y: float, row: Row, *, across: bool, color: str = "C0", marker: str = "o") -> None:
    interval = row.interval(clients_loss)
    half = interval.half if interval is not None else None
    axis.errorbar(x, y, **{"xerr" if across else "yerr": half}, fmt=marker, ms=4, capsize=2, color=color, zorder=2)


def _mean(row: Row, measure: Measure = clients_loss) -> float:
    interval = row.interval(measure)
    assert interval is not None
    return interval.mean


def _number(word: str) -> Callable[[Row], float]:
    """What stands after `word` in a variant's name."""

    def place(row: Row) -> float:
        match = re.search(re.escape(word) + r"\s*([\d.]+)", row.name)
        assert match is not None, row.name
        return float(match[1])

    return place


def _save(figure: plt.Figure, path: Path) -> Path:
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
    return path

"""The ablation's figures: dots with 95 % intervals over the seeds, beside the tables."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from summary import Row, clients_loss

try:
    import matplotlib

    matplotlib.use("agg")  # files only; no display is needed
    from matplotlib import pyplot as plt
    from matplotlib.axes import Axes
except ImportError as error:
    raise SystemExit("ERROR: plots need matplotlib: pip install -e '.[plots]', or use --no-plots") from error

Studies = Sequence[tuple[str, str, list[Row]]]
LOSS = "clients' loss on the common set, nats per token"
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
    for study in ("methods", "traffic", "signal", "blocks", "graphs", "quality"):
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
    return written


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


def _point(axis: Axes, x: float, y: float, row: Row, *, across: bool, color: str = "C0") -> None:
    interval = row.interval(clients_loss)
    half = interval.half if interval is not None else None
    axis.errorbar(x, y, **{"xerr" if across else "yerr": half}, fmt="o", ms=4, capsize=2, color=color, zorder=2)


def _mean(row: Row) -> float:
    interval = row.interval(clients_loss)
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

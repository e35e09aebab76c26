"""The figures over inner steps: of one run, a line a client, and of several runs, a line a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from statistics import fmean
from typing import TypedDict

from deca_ds.tools.report import charts
from deca_ds.tools.report.charts import Figure, Series, Value
from deca_ds.tools.report.records import Run, Scores, Step
from deca_ds.tools.report.summary import SETS, every_nth
from deca_ds.training.scores import MEAN_MODEL

SINGLE = 20  # clients that get a line each; of more, the mean and the range are drawn

Curve = Mapping[int, float]  # step -> value


class Look(TypedDict, total=False):
    """See charts.lines."""

    numbers: str
    axis: str
    points: bool
    zero: bool


_SHARE: Look = {"numbers": ".1%", "axis": ".0%", "points": True}
_LOSS: Look = {"points": True}
_FROM_ZERO: Look = {"zero": True}
_SCORES: tuple[tuple[str, Callable[[Scores], float | None], Look], ...] = (
    ("Evaluation loss", attrgetter("loss"), _LOSS),
    ("Token accuracy", attrgetter("token_accuracy"), _SHARE),
    ("Exact match", attrgetter("exact_match"), _SHARE),
    ("Accuracy", attrgetter("accuracy"), _SHARE),
)


def learning(run: Run) -> list[Figure]:
    """Draw loss and scores, and how far the clients are from each other."""
    clients = _clients(run)
    average = [Series("average", "mean of the clients", None)] if len(clients) > 1 else []
    text = f"Nats per target token, over a client's whole batch{logged(run)}."
    found = [_figure("Training loss", text, _of_steps(run, _step_loss), [*clients, *average], "loss", {})]
    for kind in run.kinds:
        with_mean = kind == "common" or "common" not in run.kinds
        model = [Series("mean", MEAN_MODEL, None)] if with_mean else []
        for name, value, look in _SCORES:
            curves = {f"c{client}": _curve(run.scores(client, kind), value) for client in run.evaluations}
            curves["mean"] = _curve(run.mean_scores, value)
            found.append(_figure(name, f"On {SETS[kind]}.", curves, [*clients, *model], name.lower(), look))
    if run.clients > 1:
        text = "Root mean square over the clients of the distance of their models from the mean model."
        found.append(_consensus({"distance": run}, [Series("distance", "consensus distance", None)], text))
    return _drawn(found)


def pace(run: Run) -> list[Figure]:
    """Draw the learning rate, where it changes, and the gradient's norm."""
    rates = {step.step: step.lr for step in run.all_steps if step.lr is not None}
    rate = [Series("lr", "learning rate", None)] if len(set(rates.values())) > 1 else []
    text = f"2-norm of the active block's gradient, before clipping{logged(run)}."
    norms = _of_steps(run, lambda step: step.norm)
    return _drawn(
        [
            _figure("Learning rate", "The same for all clients.", {"lr": rates}, rate, "learning rate",
                    {"numbers": ".3~g", "axis": "~g", "zero": True}),
            _figure("Gradient norm", text, norms, _clients(run), "norm", _FROM_ZERO),
        ]
    )  # fmt: skip


def speed(run: Run) -> list[Figure]:
    """Draw the tokens per second."""
    rates = _of_steps(run, lambda step: step.tokens / step.seconds if step.tokens and step.seconds else None)
    text = f"Tokens per second of each client in its inner steps{logged(run)}."
    look: Look = {"numbers": ",.0f", "axis": "~s", "zero": True}
    return _drawn([_figure("Speed", text, rates, _clients(run), "tokens per second", look)])


def overlaid(runs: Sequence[Run]) -> list[Figure]:
    """Draw several runs in one chart: the mean of their clients with the range, their mean models, their distances."""
    series = [Series(f"r{place}", run.name, place) for place, run in enumerate(runs)]
    named = {f"r{place}": run for place, run in enumerate(runs)}
    losses = {key: list(_of_steps(run, _step_loss).values()) for key, run in named.items()}
    found = [_ranges("Training loss", "", losses, series, "loss", {})]
    for kind in ("common", "own"):
        for name, value, look in _SCORES:
            every = {
                key: [_curve(run.scores(client, kind), value) for client in run.evaluations]
                for key, run in named.items()
            }
            found.append(_ranges(name, f" On {SETS[kind]}.", every, series, name.lower(), look))
    for name, value, look in _SCORES:
        means = {key: _curve(run.mean_scores, value) for key, run in named.items()}
        title = f"{name} of the mean model"
        found.append(_figure(title, "On the common set, else pooled.", means, series, name.lower(), look))
    found.append(_consensus(named, series, "Root mean square over the clients of the distance from the mean model."))
    return _drawn(found)


def logged(run: Run) -> str:
    """Say which steps a figure shows, where it is not every one."""
    every = every_nth(run)
    ending = {1: "st", 2: "nd", 3: "rd"}.get(every % 10 if every % 100 not in (11, 12, 13) else 0, "th")
    return f", at every {every}{ending} step" if every > 1 else ""


def _clients(run: Run) -> list[Series]:
    """Return a series for each client, or one series for their mean if there are many."""
    if len(run.steps) > SINGLE:
        name = f"mean of {len(run.steps)} clients; the band is their range"
        return [Series("average", name, 0, band=True)]
    return [Series(f"c{client}", f"client {client}", client) for client in sorted(run.steps)]


def _consensus(runs: Mapping[str, Run], series: Sequence[Series], text: str) -> Figure | None:
    curves = {
        key: {each.step: each.distance for each in run.together if each.distance is not None}
        for key, run in runs.items()
        if run.clients > 1
    }
    return _figure("Consensus distance", text, curves, series, "distance", {"points": True, "zero": True})


def _ranges(
    title: str,
    text: str,
    every: Mapping[str, Sequence[Curve]],
    series: Sequence[Series],
    unit: str,
    look: Look,
) -> Figure | None:
    """Draw the mean over clients and their range, for each run. every: the curves of each run's clients."""
    curves: dict[str, Curve] = {}
    for key, own in every.items():
        curves |= _range(key, own)
    shown = [Series(s.key, s.name, s.place, band=f"{s.key}_low" in curves) for s in series]
    return _figure(title, f"Mean over the clients; the band is their range.{text}", curves, shown, unit, look)


def _range(key: str, own: Sequence[Curve]) -> dict[str, Curve]:
    """Return the mean of the curves and, if there are several, their lowest and highest values."""
    values = {step: [curve[step] for curve in own if step in curve] for step in {s for curve in own for s in curve}}
    found: dict[str, Curve] = {key: {step: fmean(each) for step, each in values.items()}}
    if len(own) > 1:
        found[f"{key}_low"] = {step: min(each) for step, each in values.items()}
        found[f"{key}_high"] = {step: max(each) for step, each in values.items()}
    return found


def _figure(
    title: str, text: str, curves: Mapping[str, Curve], series: Sequence[Series], unit: str, look: Look
) -> Figure | None:
    """Draw a figure; None if no series has a value. curves: by the keys of series; those of clients also give the curve
    "average" and its range."""
    own = [curve for key, curve in curves.items() if key.startswith("c") and curve]
    named = {**curves, **_range("average", own)}
    shown = [s for s in series if named.get(s.key)]
    keys = [s.key for s in shown] + [f"{s.key}_{end}" for s in shown if s.band for end in ("low", "high")]
    steps = sorted({step for key in keys for step in named[key]})
    if not steps:
        return None
    rows: list[dict[str, Value]] = [
        {"x": step, **{key: named[key][step] for key in keys if step in named[key]}} for step in steps
    ]
    thinned = charts.thin(rows)
    if len(thinned) < len(rows):
        text += f" Each point is the mean of {-(-len(rows) // charts.MOST_POINTS)} logged steps."
    return Figure(title, text.strip(), charts.lines(thinned, shown, unit, **look), shown if len(shown) > 1 else ())


def _drawn(figures: Sequence[Figure | None]) -> list[Figure]:
    return [figure for figure in figures if figure is not None]


def _of_steps(run: Run, value: Callable[[Step], float | None]) -> dict[str, Curve]:
    """Return a curve for each client."""
    return {
        f"c{client}": {step.step: found for step in steps if (found := value(step)) is not None}
        for client, steps in run.steps.items()
    }


def _curve(every: Sequence[tuple[int, Scores]], value: Callable[[Scores], float | None]) -> Curve:
    return {step: found for step, scores in every if (found := value(scores)) is not None}


def _step_loss(step: Step) -> float | None:
    return step.loss

"""Several runs beside each other: what differs in their configurations, and what that did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deca_ds.tools.report.records import Run, Scores
from deca_ds.tools.report.summary import averaged
from deca_ds.tools.report.wording import NONE, setting

# Runs that agree in these score their models on the same common examples.
_SAME_SET = (
    *("data.train", "data.evaluation", "data.common_holdout", "data.max_examples", "data.format", "data.max_length"),
    *("data.prompt", "data.label_names", "data.text_columns", "evaluation.max_examples", "run.seed"),
)
_OF_THE_FOLDER = ("run.output", "run.resume")


@dataclass(frozen=True)
class Gap:
    """What a run has closed of the gap between clients alone and one model on all data: 0 as alone, 1 as with all data
    in one place. None where that cannot be said. alone, central: names of the runs that bracket it."""

    alone: str
    central: str
    loss: float | None
    accuracy: float | None


def differences(runs: Sequence[Run], defaults: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Return (key, its value in every run) for the keys in which the runs differ. defaults: of keys that a run's file
    lacks."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key not in _OF_THE_FOLDER)
    found = []
    for key in keys:
        values = [run.config.get(key, defaults.get(key)) for run in runs]
        if any(value != values[0] for value in values):
            found.append((key, [setting(key, value) for value in values]))
    return found


def changed(run: Run, defaults: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return (key, value, default) for the keys that are not as the schema has them."""
    return [
        (key, setting(key, value), NONE if defaults.get(key) == "???" else setting(key, defaults.get(key)))
        for key, value in run.config.items()
        if value != defaults.get(key) and key not in _OF_THE_FOLDER
    ]


def clients_scores(run: Run) -> Scores | None:
    """Return the mean over clients of the last scores on the common set, else on their own, if they have trained."""
    return _last(run, run.kinds[0]) if run.kinds else None


def is_alone(run: Run) -> bool:
    """Return whether every client trained by itself."""
    return run.clients > 1 and run.config.get("gossip.graph") == "isolated"


def gaps(runs: Sequence[Run]) -> list[Gap | None]:
    """Return the gap of every run: None unless a run of clients alone and one of a single client with all data, which
    scored the same common examples, bracket it. Of several brackets the best counts, by the loss of the clients on the
    common set."""
    return [_gap(run, [other for other in runs if _same_set(run, other)]) for run in runs]


def _gap(run: Run, runs: Sequence[Run]) -> Gap | None:
    ended = [(scores, other) for other in runs if (scores := _common(other)) is not None and scores.loss is not None]
    own = _common(run)
    alone = [(scores, other) for scores, other in ended if is_alone(other)]
    central = [(scores, other) for scores, other in ended if other.clients == 1]
    if own is None or run.clients == 1 or is_alone(run) or not alone or not central:
        return None
    low, lowest = min(alone, key=lambda pair: pair[0].loss or 0.0)
    high, highest = min(central, key=lambda pair: pair[0].loss or 0.0)
    return Gap(
        lowest.name,
        highest.name,
        _closed(own.loss, low.loss, high.loss, better=-1),
        _closed(own.accuracy, low.accuracy, high.accuracy, better=1),
    )


def _closed(own: float | None, alone: float | None, central: float | None, better: int) -> float | None:
    """Return (own - alone) / (central - alone); None where all data in one place is no better than alone."""
    if own is None or alone is None or central is None or better * (central - alone) <= 0:
        return None
    return (own - alone) / (central - alone)


def _common(run: Run) -> Scores | None:
    return _last(run, "common")


def _last(run: Run, kind: str) -> Scores | None:
    every = [scores for step, scores in averaged(run, kind) if step]
    return every[-1] if every else None


def _same_set(run: Run, other: Run) -> bool:
    scores, others = _common(run), _common(other)
    return (
        scores is not None
        and others is not None
        and scores.examples == others.examples
        and all(run.config.get(key) == other.config.get(key) for key in _SAME_SET)
        and not run.config.get("data.per_client")
    )

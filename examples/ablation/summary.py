"""From the ablation's raw runs to numbers: tuned learning rates, means over seeds, intervals, differences, shares."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from ablation import Variant, run_key, variants
from scipy import stats

Run = Mapping[str, Any]
Measure = Callable[[Run], float | None]

TIME_VARYING = ("base", "one_peer_exponential", "random_pairs")  # gossip.graph
LOCAL, CENTRAL = "adamw, alone", "adamw, all data"  # the brackets of a study, where it has both


@dataclass(frozen=True)
class Interval:
    """Mean over seeds and the half-width of its 95 % interval (Student's t); no half-width for a single seed."""

    mean: float
    half: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """values: one per seed, at least one. Infinite with one that is not finite."""
        if not all(map(math.isfinite, values)):
            return cls(math.inf, None)
        if len(values) < 2:
            return cls(values[0], None)
        return cls(fmean(values), float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values)))

    @property
    def excludes_zero(self) -> bool:
        return self.half is not None and abs(self.mean) > self.half


@dataclass(frozen=True)
class Row:
    """One variant of a study on one data set. lr: the tuned one. runs: at it, one per seed, ascending.

    tried: learning rate -> loss on the tuning seed. A row that never ran has no runs.
    """

    variant: Variant
    lr: float | None
    runs: tuple[Run, ...]
    tried: Mapping[float, float]

    @property
    def at_the_end(self) -> bool:
        """Whether the best learning rate is the smallest or the largest that was tried."""
        return self.lr in (min(self.tried), max(self.tried))

    @property
    def name(self) -> str:
        return self.variant.name

    def values(self, measure: Measure) -> list[float]:
        """One value per seed, of the runs that have it."""
        return [value for run in self.runs if (value := measure(run)) is not None]

    @property
    def diverged(self) -> int:
        """Number of seeds whose run diverged at the tuned learning rate."""
        return sum(map(math.isinf, self.values(clients_loss)))

    def average(self, key: str) -> float | None:
        """Mean over the seeds of a number of the records: a seed draws its own Erdos-Renyi graph, so traffic and
        spectral gap are not the same at every seed. None where a run has no such number."""
        values = [run[key] for run in self.runs if run.get(key) is not None]
        return fmean(values) if values and len(values) == len(self.runs) else None

    @property
    def bound(self) -> float | None:
        """The factor that an averaging shrinks the distance to the mean by at worst: 1 - spectral gap. None for graphs
        that change from one averaging to the next: their gap is of a whole period."""
        gap = self.average("spectral_gap")
        return None if gap is None or self.variant.keys.get("gossip.graph") in TIME_VARYING else 1 - gap

    def interval(self, measure: Measure) -> Interval | None:
        """None where the row did not run, or has no such value."""
        values = self.values(measure)
        return Interval.of(values) if values else None


Studies = Sequence[tuple[str, str, list[Row]]]  # (study, data set, rows)


def clients_loss(run: Run) -> float:
    """Mean over the clients of the loss on the common set; infinite for a run that diverged."""
    return run["loss"] if run["loss"] is not None and math.isfinite(run["loss"]) else math.inf


def mean_model(key: str) -> Measure:
    """A score of the mean model; where one client holds all data, of that client."""
    return lambda run: (run["mean"] or (run["clients"][0] if len(run["clients"]) == 1 else {})).get(key)


def clients_mean(key: str) -> Measure:
    """Mean over the clients of a score on the common set."""
    return lambda run: fmean(c[key] for c in run["clients"]) if run["clients"] and key in run["clients"][0] else None


def summarize(studies: Mapping[str, Any], runs: Mapping[str, Run]) -> Iterator[tuple[str, str, list[Row]]]:
    """(study, data set, rows) in the order of ablation.yaml. runs: by key, see ablation.finished."""
    rows: dict[tuple[str, str], list[Row]] = {}
    for variant in variants(dict(studies)):
        rows.setdefault((variant.study, variant.dataset), []).append(_row(variant, studies["tune"], runs))
    for (study, dataset), found in rows.items():
        yield study, dataset, found


def _row(variant: Variant, tune: Mapping[str, Any], runs: Mapping[str, Run]) -> Row:
    def run(lr: float, seed: int) -> Run | None:
        return runs.get(run_key(variant.keys | {tune["key"]: lr, "run.seed": seed}))

    grid = {value * 2.0**power for value in tune["grid"] for power in range(-8, 9)}
    tried = {lr: clients_loss(found) for lr in sorted(grid) if (found := run(lr, tune["tuning_seed"])) is not None}
    if not tried:
        return Row(variant, None, (), {})
    best = min(tried, key=tried.__getitem__)
    at_best = [run(best, seed) for seed in variant.seeds]
    if any(found is None for found in at_best):  # still being tuned
        return Row(variant, None, (), tried)
    return Row(variant, best, tuple(found for found in at_best if found is not None), tried)


def differences(row: Row, reference: Row, measure: Measure = clients_loss) -> list[float]:
    """Row minus reference, seed by seed; the graph and the common set are those of the seed. Empty where one did not
    run, or diverged, or has no such value."""
    if not row.runs or not reference.runs or row.diverged or reference.diverged:
        return []
    return [a - b for a, b in zip(row.values(measure), reference.values(measure), strict=True)]


def difference(row: Row, reference: Row, measure: Measure = clients_loss) -> Interval | None:
    """The interval of `differences`; None where there are none."""
    values = differences(row, reference, measure)
    return Interval.of(values) if values else None


def corrected(comparisons: Sequence[Sequence[float]], planned: int = 0) -> list[float | None]:
    """The p-value of each comparison, given by its paired differences, against "no difference" (two-sided t test),
    corrected for their number (Holm 1979): with no true difference at all, one of them lies under 0.05 in at most 5 %
    of studies. None, and not counted, where there are fewer than two differences or all are 0. planned: how many there
    will be at least, so that what has not run yet cannot undo a finding."""
    found = [_p_value(values) for values in comparisons]
    order = sorted((value, place) for place, value in enumerate(found) if value is not None)
    number, least = max(planned, len(order)), 0.0
    for rank, (value, place) in enumerate(order):
        found[place] = least = max(least, min(1.0, (number - rank) * value))
    return found


def _p_value(values: Sequence[float]) -> float | None:
    if len(values) < 2 or not any(values):
        return None
    error = stdev(values) / math.sqrt(len(values))
    return 2 * float(stats.t.sf(abs(fmean(values)) / error, len(values) - 1)) if error > 0 else 0.0


def agreeing(values: Sequence[float]) -> int:
    """How many values have the sign of their mean."""
    return sum(value * fmean(values) > 0 for value in values)


def pairs_without_signal(studies: Studies) -> Iterator[tuple[str, str, Row, Row]]:
    """(study, data set, deca, gossip-adam) of all settings that ran with both; a setting of several studies comes once,
    but for studies with other seeds.

    The one's keys are the other's with another method, so that the signal is all that differs.
    """
    with_signal: dict[tuple[str, tuple[int, ...]], tuple[str, str, Row]] = {}
    for study, dataset, rows in studies:
        for row in rows:
            with_signal.setdefault((run_key(row.variant.keys), row.variant.seeds), (study, dataset, row))
    seen = set()
    for _, _, rows in studies:
        for row in rows:
            keys = {name: value for name, value in row.variant.keys.items() if name != "algorithm.method"}
            setting = run_key(keys), row.variant.seeds
            if row.variant.keys.get("algorithm.method") == "gossip-adam" and setting in with_signal:
                study, dataset, deca = with_signal[setting]
                if setting not in seen and deca.runs and row.runs:
                    seen.add(setting)
                    yield study, dataset, deca, row


def gap_closed(row: Row, rows: Sequence[Row], measure: Measure) -> Interval | None:
    """(local - x) / (local - central), seed by seed: 0 as every client alone, 1 as with all data in one place.

    None unless the study has both brackets and they differ at every seed.
    """
    named = {each.name: each for each in rows}
    if LOCAL not in named or CENTRAL not in named:
        return None
    x, local, central = (each.values(measure) for each in (row, named[LOCAL], named[CENTRAL]))
    if not x or not len(x) == len(local) == len(central):
        return None
    if any(b == c for b, c in zip(local, central, strict=True)):
        return None
    return Interval.of([(b - a) / (b - c) for a, b, c in zip(x, local, central, strict=True)])

"""The scores of an evaluation, and those of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deca_ds.run_folder import client_metrics, job_metrics

Scores = Mapping[str, Any]  # see training/evaluation.py
SETS = {"own": "own set", "common": "common set"}
MEAN_MODEL = "mean model"
SHARES = {"accuracy": "accuracy", "exact_match": "exact match"}  # of examples, and their titles


@dataclass(frozen=True)
class Evaluation:
    """The scores after `step` inner steps. clients: by number, the scores on the sets that there are, "own" and
    "common". mean: the scores of the mean model, on the common set or, without one, pooled over the clients' own;
    empty if it was not scored. distance: the consensus distance; None if it was not measured."""

    step: int
    clients: Mapping[int, Mapping[str, Scores]]
    mean: Scores
    distance: float | None = None

    @classmethod
    def of(cls, step: int, client: int, own: Mapping[str, Any], job: Mapping[str, Any]) -> Evaluation:
        """Make one from the metrics of a client and of the job, which has none if clients tell each other no scores."""
        mine = {client: {name: own[name] for name in SETS if name in own}}
        told = {int(number): sets for number, sets in job.get("clients", {}).items()}
        return cls(step, dict(sorted((mine | told).items())), job.get("mean", {}), job.get("consensus_distance"))

    def line(self, steps: int, seconds: float) -> str:
        """Describe the evaluation in a line of a log. steps: of the run. seconds: how long it took."""
        parts = []
        for name, title in SETS.items():
            scores = [sets[name] for sets in self.clients.values() if name in sets]
            if scores:
                who = "clients" if len(scores) > 1 else f"client {next(iter(self.clients))}"
                parts.append(f"{title}, {who}: {_ranges(scores)}")
        if self.mean:
            parts.append(f"{MEAN_MODEL}: {_ranges([self.mean])}")
        if self.distance is not None:
            parts.append(f"consensus distance {self.distance:.3g}")
        return (
            f"evaluation after step {self.step} of {steps} ({seconds:.1f} s): {'; '.join(parts) or 'no set to score'}"
        )

    @property
    def own_sets(self) -> list[int]:
        """The clients on whose own sets `loss` is measured, ascending; none if it is on the common set. Losses can be
        compared if these are the same."""
        if any("common" in sets for sets in self.clients.values()):
            return []
        return sorted(client for client, sets in self.clients.items() if "own" in sets)

    @property
    def loss(self) -> float | None:
        """The loss by which evaluations are compared: of the mean model, else the mean over clients, on the common set
        if there is one. In nats per token; None without an evaluation set."""
        if self.mean:
            return float(self.mean["loss"])
        for name in reversed(SETS):
            losses = [sets[name]["loss"] for sets in self.clients.values() if name in sets]
            if losses:
                return float(sum(losses) / len(losses))
        return None


@dataclass(frozen=True)
class RunResult:
    """The result of a run. output: its folder. evaluations: all of them, in their order; the last one is of the models
    at the end."""

    output: Path
    evaluations: Sequence[Evaluation]

    @property
    def best(self) -> Evaluation | None:
        """The first one with the lowest loss, of those that can be compared with the last; None without scores."""
        return best_of(self.evaluations) if self.evaluations else None


def evaluations(run: Path, client: int) -> list[Evaluation]:
    """Read the evaluations in the run's metrics, as far as they are on this host: of `client`, and of the job."""
    job = {line["step"]: line for line in _lines(job_metrics(run))}
    own = {line["step"]: line for line in _lines(client_metrics(run, client))}
    return [Evaluation.of(step, client, own[step], job.get(step, {})) for step in sorted(own)]


def best_of(found: Sequence[Evaluation]) -> Evaluation | None:
    """Return the first evaluation with the lowest loss, of those on the same sets as the last one."""
    comparable = (each for each in found if each.loss is not None and each.own_sets == found[-1].own_sets)
    return min(comparable, key=lambda each: each.loss or 0.0, default=None)


def figure(key: str, value: float) -> str:
    """Return a score as it is printed. key: of `Scores`."""
    return f"{value:.1%}" if key in SHARES else f"{value:.3f}" if value < 100 else f"{value:.4g}"


def _ranges(scores: Sequence[Scores]) -> str:
    known = [key for key in ("loss", *SHARES) if key in scores[0]]
    return ", ".join(f"{SHARES.get(key, key)} {_range(key, [each[key] for each in scores])}" for key in known)


def _range(key: str, values: Sequence[float]) -> str:
    low, high = figure(key, min(values)), figure(key, max(values))
    return low if low == high else f"{low} to {high}"


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_file():
        with open(path, encoding="utf-8") as file:
            for line in file:
                if '"kind": "evaluation"' in line and line.endswith("}\n"):  # else its process was killed meanwhile
                    yield json.loads(line)

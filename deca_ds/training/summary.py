"""Scores in words: a line for an evaluation, and at the end of a run a table of before and after."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from deca_ds.printing import print_line
from deca_ds.run_folder import client_metrics, job_metrics

Scores = Mapping[str, Any]  # see training/evaluation.py
SETS = {"own": "own set", "common": "common set"}
MEAN_MODEL = "mean model"
BEST, NEWEST = "best", "newest"  # for deca export --checkpoint
_HOW_IT_ENDED = "how the job ended: the launcher's exit code may be that of a lost client"
_SHARES = {"accuracy": "accuracy", "exact_match": "exact match"}  # of examples, and their titles


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


def print_summary(found: Sequence[Evaluation]) -> None:
    """Print a table of the first and the last evaluation, and which of all was the best."""
    console = Console(color_system=None, highlight=False)  # mpirun shows its ranks a terminal, also into a file
    if not found or found[-1].loss is None:
        return
    print_line(console, f"scores before and after: step {found[0].step} -> {found[-1].step}")
    console.print(_table(found[0], found[-1]))
    best = best_of(found)
    assert best is not None
    last = found[-1].step
    where = "the last one" if best.step == last else f"after step {best.step} of {last}"
    by = MEAN_MODEL if best.mean else "clients, on average" if len(best.clients) > 1 else "client"
    print_line(console, f"best evaluation: {where}; loss of the {by}: {_number('loss', best.loss or 0.0)}")


def best_of(found: Sequence[Evaluation]) -> Evaluation | None:
    """Return the first evaluation with the lowest loss, of those on the same sets as the last one."""
    comparable = (each for each in found if each.loss is not None and each.own_sets == found[-1].own_sets)
    return min(comparable, key=lambda each: each.loss or 0.0, default=None)


def next_commands(run: Path, clients: int, *, best: bool = False, lost: bool = False) -> str:
    """Name commands for a run that is done, a line each. clients: of the run. best: whether there is a checkpoint of
    the best evaluation. lost: whether the launcher has seen ranks fail without which the others continued."""
    folder = shlex.quote(str(run))
    return (
        f"  deca status {folder}          {_HOW_IT_ENDED}\n"
        * lost
        + f"  deca report {folder}          a page of what happened\n"
        f"  deca export {folder} MODEL    the {MEAN_MODEL if clients > 1 else 'model'} as a folder for from_pretrained"
        + f" (the best one: --checkpoint {BEST})"
        * best
    )


def stopped_commands(run: Path, *, best: bool, lost: bool) -> str:
    """Name what to do with a run that has stopped, besides continuing it. best, lost: as for `next_commands`."""
    folder, which = shlex.quote(str(run)), BEST if best else NEWEST
    export = f"  deca export {folder} MODEL --checkpoint {which}    "
    return f"{f'  deca status {folder}':{len(export)}}{_HOW_IT_ENDED}\n" * lost + f"{export}its {which} model so far"


def _table(before: Evaluation, after: Evaluation) -> Table:
    sets = [name for name in SETS if any(name in each for each in after.clients.values())]
    mean_set = sets[-1]  # the common set, or the own ones pooled
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    table.add_column("model", no_wrap=True)
    columns = []
    for name in sets:
        for key in ("loss", *_SHARES):
            if any(key in each.get(name, {}) for each in after.clients.values()):
                columns.append((name, key))
                table.add_column(f"{SETS[name]}\n{_SHARES.get(key, key)}", justify="right", no_wrap=True)
    for client, scores in after.clients.items():
        earlier = before.clients.get(client, {})
        table.add_row(f"client {client}", *(_change(earlier.get(n, {}), scores.get(n, {}), key) for n, key in columns))
    if after.mean:
        earlier = before.mean if before.own_sets == after.own_sets else {}
        means = (_change(earlier, after.mean, key) if name == mean_set else "" for name, key in columns)
        table.add_row(MEAN_MODEL, *means)
    return table


def _change(before: Scores, after: Scores, key: str) -> str:
    return " -> ".join(_number(key, scores[key]) if key in scores else "?" for scores in (before, after))


def _ranges(scores: Sequence[Scores]) -> str:
    known = [key for key in ("loss", *_SHARES) if key in scores[0]]
    return ", ".join(f"{_SHARES.get(key, key)} {_range(key, [each[key] for each in scores])}" for key in known)


def _range(key: str, values: Sequence[float]) -> str:
    low, high = _number(key, min(values)), _number(key, max(values))
    return low if low == high else f"{low} to {high}"


def _number(key: str, value: float) -> str:
    return f"{value:.1%}" if key in _SHARES else f"{value:.3f}" if value < 100 else f"{value:.4g}"


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_file():
        with open(path, encoding="utf-8") as file:
            for line in file:
                if '"kind": "evaluation"' in line and line.endswith("}\n"):  # else its process was killed meanwhile
                    yield json.loads(line)

"""What a run's folder holds, as a report uses it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any


@dataclass(frozen=True)
class Step:
    """A logged inner step of a client, counted from 1. loss: nats per target token. seconds: of the step, of which it
    has `waited` for neighbours."""

    step: int
    round: int | None
    block: str
    lr: float | None
    loss: float | None
    norm: float | None
    seconds: float | None
    waited: float | None
    tokens: float | None


@dataclass(frozen=True)
class Scores:
    """Of one model on one evaluation set. recall: label -> share. confusion: (right label, answer) -> examples."""

    loss: float | None
    perplexity: float | None
    examples: int | None
    token_accuracy: float | None = None
    exact_match: float | None = None
    accuracy: float | None = None
    macro_f1: float | None = None
    recall: Mapping[str, float] = field(default_factory=dict)
    confusion: Mapping[tuple[str, str], int] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """Of one client after `step` inner steps. before, after: peak bytes of every rank, before and after the evaluation.
    sent: bytes since the job's start. skipped: neighbour -> averagings without it."""

    step: int
    own: Scores | None
    common: Scores | None
    seconds: float | None = None
    before: tuple[float, ...] = ()
    after: tuple[float, ...] = ()
    sent: float | None = None
    skipped: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Together:
    """Of all clients after `step` inner steps: the scores of their mean model and their consensus distance."""

    step: int
    mean: Scores | None
    distance: float | None


@dataclass(frozen=True)
class Membership:
    """Who trains from inner step `step` on. parts: groups that averagings join. time: seconds since 1970."""

    step: int
    clients: tuple[int, ...]
    gap: float | None
    parts: int
    time: float | None


@dataclass(frozen=True)
class Handover:
    """Client `by` gave its state to client `to`, which trains from inner step `step` on."""

    step: int
    to: int
    by: int | None
    time: float | None


@dataclass(frozen=True)
class Start:
    """One start of the job, after `step` inner steps. rounds: of the whole run, where the entry tells. method: in
    words. papers: on arXiv, of the method."""

    step: int
    rounds: int | None
    time: float | None
    ranks: tuple[int, ...]
    device: str
    transport: str
    method: str
    papers: tuple[str, ...]
    software: Mapping[str, str]
    architecture: str
    parameters: int | None
    blocks: Mapping[str, int]


@dataclass(frozen=True)
class Edge:
    """round_trip_ms, mb_per_s: of the slowest pair of ranks."""

    clients: tuple[int, int]
    hosts: tuple[str, str]
    round_trip_ms: float | None
    mb_per_s: float | None


@dataclass(frozen=True)
class Share:
    """What a client trains on: numbers of examples, and of these by label."""

    client: int
    train: int
    examples: int
    own_evaluation: int
    common_evaluation: int
    train_tokens: int
    target_tokens: int
    labels: Mapping[str, int]


@dataclass(frozen=True)
class Run:
    """config: section.key -> value. steps, evaluations: by client, ascending by step. end: DONE, STOPPED or FAILED
    with what it says. lost: client -> why it ended. last_sign: when, since 1970, and which rank did what. notes: what
    could not be read."""

    path: Path
    name: str
    config: Mapping[str, Any]
    simulated: bool
    steps: Mapping[int, Sequence[Step]]
    evaluations: Mapping[int, Sequence[Evaluation]]
    together: Sequence[Together]
    memberships: Sequence[Membership]
    handovers: Sequence[Handover]
    starts: Sequence[Start]
    edges: Sequence[Edge]
    data: Sequence[Share]
    end: tuple[str, str] | None
    lost: Mapping[int, str]
    last_sign: tuple[float, str] | None
    notes: Sequence[str]

    @property
    def clients(self) -> int:
        """The number of clients of the configuration."""
        return int(self.config.get("cluster.clients", 1))

    @property
    def grouped_by(self) -> str:
        """What the labels of `data` are: the examples' own, or values of the column by which they were shared out."""
        return str(self.config.get("data.partition_column") or "label")

    @property
    def counts_labels(self) -> bool:
        """Whether the labels of `data` are those that models answer with."""
        return self.config.get("data.partition_column") in (None, self.config.get("data.label_column"))

    @property
    def all_steps(self) -> Iterator[Step]:
        for steps in self.steps.values():
            yield from steps

    @property
    def reached(self) -> int:
        """Inner steps that are known to be done."""
        logged = [step.step for step in self.all_steps]
        scored = [each.step for of in self.evaluations.values() for each in of]
        return max([*logged, *scored], default=0)

    def members(self, step: int) -> set[int]:
        """Return the clients that do inner step `step` with the others, as far as the job's records tell."""
        there = set(range(self.clients))
        for change in self.memberships:
            if change.step <= step:
                there = set(change.clients)
        return there

    def scores(self, client: int, kind: str) -> list[tuple[int, Scores]]:
        """Return (step, scores) of a client's evaluations on the `kind` of set, own or common."""
        every = ((each.step, each.own if kind == "own" else each.common) for each in self.evaluations.get(client, ()))
        return [(step, scores) for step, scores in every if scores is not None]

    @property
    def mean_scores(self) -> list[tuple[int, Scores]]:
        """(step, scores) of the mean model."""
        return [(each.step, each.mean) for each in self.together if each.mean is not None]

    @property
    def kinds(self) -> list[str]:
        """Which evaluation sets there are: common, own."""
        return [kind for kind in ("common", "own") if any(self.scores(client, kind) for client in self.evaluations)]


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are there; None of none."""
    there = [value for value in values if value is not None]
    return fmean(there) if there else None

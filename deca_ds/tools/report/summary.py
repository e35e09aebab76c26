"""A run in words and numbers: how it stands, what it trained, how its models score, and what happened to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from operator import attrgetter
from pathlib import Path
from typing import Any

from deca_ds.checkpoint.done import steps_told
from deca_ds.plural import named, several
from deca_ds.run_folder import DONE
from deca_ds.tools.report.records import Run, Scores, mean
from deca_ds.tools.report.wording import (
    count,
    moment,
    percent,
    redact,
    rough_duration,
    short_count,
    significant,
    size,
)
from deca_ds.training.scores import MEAN_MODEL

_SHOWN = 8  # clients that an event names
SETS = {"common": "the common evaluation set", "own": "each client's own evaluation set"}


@dataclass(frozen=True)
class Row:
    """How one model scores. series: its name in the figures, or none. base: before training. after: the last time,
    after `step` inner steps; without scores if that was before training. best_loss, best_accuracy: (step, value)."""

    model: str
    series: str
    step: int
    base: Scores | None
    after: Scores
    best_loss: tuple[int, float] | None
    best_accuracy: tuple[int, float] | None


@dataclass(frozen=True)
class Event:
    """Something that happened after `step` inner steps, or at no known one."""

    step: int | None
    time: float | None
    what: str


def length(run: Run) -> int | None:
    """Return the inner steps of the whole run, where its files tell."""
    if run.end is not None and (told := steps_told(run.end[1])) is not None:
        return told
    blocks = len(run.starts[-1].blocks) if run.starts else 0
    inner = run.config.get("algorithm.inner_steps")
    if blocks and isinstance(rounds := rounds_of(run), int) and isinstance(inner, int):
        return rounds * blocks * inner
    return run.reached if run.simulated else None  # a simulation writes its folder when it is through


def rounds_of(run: Run) -> Any:
    """Return the rounds of the whole run; where the configuration does not say, those that algorithm.epochs came to."""
    counted = run.starts[-1].rounds if run.starts else None
    return counted or run.config.get("algorithm.rounds")


def blocks(run: Run) -> list[str]:
    """Return the blocks' labels, in the model's order where that is known, else as they came."""
    if run.starts and run.starts[-1].blocks:
        return list(run.starts[-1].blocks)
    return list(dict.fromkeys(step.block for step in run.all_steps))


def state(run: Run) -> tuple[str, str]:
    """Return the state of the run in one word, and what it means."""
    if run.end is not None:
        return run.end[0], redact(run.end[1])
    if run.simulated:
        return DONE, f"{several(run.reached, 'inner step')}, simulated in one process"
    seen = ""
    if run.last_sign is not None:
        seen = f"; last sign of life {moment(run.last_sign[0])} ({run.last_sign[1]})"
    return "NO END", f"the run has not ended, or was killed: no marker says how it ended{seen}"


def graph_name(run: Run) -> str:
    """Name what joins the clients: a graph, or a file with a mixing matrix."""
    if matrix := run.config.get("gossip.matrix"):
        return redact(Path(str(matrix)).name)
    return str(run.config.get("gossip.graph")).replace("_", " ")


def sentences(run: Run) -> list[str]:
    """Say what was done, for somebody who has not seen the configuration."""
    value, start = run.config.get, run.starts[-1] if run.starts else None
    model = f"{start.architecture} of {short_count(start.parameters)} parameters" if start else str(value("model.path"))
    method = (start.method if start else "") or str(value("algorithm.method"))
    where = "simulated in one process" if run.simulated else _ranks(run)
    graph = f"on the {graph_name(run)} graph"
    if value("gossip.matrix"):
        graph = f"with the mixing matrix {graph_name(run)}"
    elif value("gossip.graph") == "isolated":
        graph = "without gossip"
    who = several(run.clients, "client") + (f" {graph}" if run.clients > 1 else "")
    said = [f"{who} trained {redact(model)} with {method}{f', {where}' if where else ''}."]
    order = len(blocks(run))
    plan = f"{rounds_of(run)} rounds × {order} blocks × {value('algorithm.inner_steps')} inner steps"  # noqa: RUF001
    total = length(run)
    said.append(
        f"{plan if order > 1 else several(total or run.reached, 'inner step')}, "
        f"{value('data.batch_size')} sequences per client and step, learning rate {value('optimizer.lr')} "
        f"({value('optimizer.schedule')})."
    )
    return said


def _ranks(run: Run) -> str:
    if not run.starts or not run.starts[-1].ranks:
        return ""
    ranks, start = run.starts[-1].ranks, run.starts[-1]
    each = f"{ranks[0]} a client" if len(set(ranks)) == 1 else f"by client {', '.join(map(str, ranks))}"
    inside = [each] * (len(ranks) > 1) + [redact(start.device)] * bool(start.device)
    return f"on {several(sum(ranks), 'rank')}" + (f" ({', '.join(inside)})" if inside else "")


def figures_of(run: Run) -> list[tuple[str, str]]:
    """Return the numbers that come first: (name, value)."""
    total, found = length(run), []
    found.append(("inner steps", f"{count(run.reached)} of {count(total)}" if total else count(run.reached)))
    for kind in run.kinds[:1]:
        found += _before_and_after(run, kind)
    distances = [each.distance for each in run.together if each.distance is not None]
    if distances and run.clients > 1:
        found.append(("consensus distance", f"{distances[-1]:.3g}"))
    if (seen := tokens(run)) is not None:
        found.append(("tokens trained", short_count(seen)))
    if (seconds := training_seconds(run)) is not None:
        found.append(("training time", rough_duration(seconds)))
    if (sent := sent_by_client(run)) and max(sent.values()):
        found.append(("sent by a client", size(max(sent.values()))))
    return found


def _before_and_after(run: Run, kind: str) -> Iterator[tuple[str, str]]:
    rows = {row.model: row for row in score_rows(run, kind)}
    row = rows.get(MEAN_MODEL) or rows.get("mean of the clients") or next(iter(rows.values()), None)
    if row is None:
        return
    before = row.base
    model = row.model if row.step == run.reached else f"{row.model}, step {count(row.step)}"
    shown = (("accuracy", attrgetter("accuracy"), percent), ("exact match", attrgetter("exact_match"), percent))
    for name, of, written in (*shown, ("loss", attrgetter("loss"), significant)):
        values = [written(of(scores)) for scores in (before, row.after) if scores and of(scores) is not None]
        if values:
            yield f"{name}, {model}", " → ".join(values)


def score_rows(run: Run, kind: str) -> list[Row]:
    """Return every model's scores on a kind of set: the mean model's, the mean of the clients', and each client's."""
    found = [
        row
        for client in sorted(run.evaluations)
        if (row := _row(f"client {client}", f"c{client}", run.scores(client, kind))) is not None
    ]
    first = []
    if (kind == "common" or "common" not in run.kinds) and (
        row := _row(MEAN_MODEL, "mean", _comparable(run, kind, run.mean_scores))
    ) is not None:
        first.append(row)
    averages = _comparable(run, kind, averaged(run, kind))
    if len(found) > 1 and (row := _row("mean of the clients", "average", averages)) is not None:
        first.append(row)
    return [*first, *found]


def _comparable(run: Run, kind: str, every: Sequence[tuple[int, Scores]]) -> list[tuple[int, Scores]]:
    """Return those scores of all clients together that cover the same examples as the last: a client that leaves takes
    its own set with it."""
    return [each for each in every if kind == "common" or run.members(each[0] + 1) == run.members(every[-1][0] + 1)]


def averaged(run: Run, kind: str) -> list[tuple[int, Scores]]:
    """Return the mean over clients of every score, after each step at which all those were scored that were there."""
    every = {client: dict(run.scores(client, kind)) for client in run.evaluations if run.scores(client, kind)}
    found = []
    for step in sorted({step for scores in every.values() for step in scores}):
        there = [scores[step] for scores in every.values() if step in scores]
        if any(step not in scores for client, scores in every.items() if client in run.members(step + 1)):
            continue  # one was late when this was read
        found.append(
            (
                step,
                Scores(
                    loss=mean([scores.loss for scores in there]),
                    perplexity=mean([scores.perplexity for scores in there]),
                    examples=there[0].examples,
                    token_accuracy=mean([scores.token_accuracy for scores in there]),
                    exact_match=mean([scores.exact_match for scores in there]),
                    accuracy=mean([scores.accuracy for scores in there]),
                    macro_f1=mean([scores.macro_f1 for scores in there]),
                ),
            )
        )
    return found


def _row(model: str, series: str, every: Sequence[tuple[int, Scores]]) -> Row | None:
    if not every:
        return None
    step, after = every[-1]
    losses = [(scores.loss, step) for step, scores in every if scores.loss is not None]
    rights = [(-scores.accuracy, step) for step, scores in every if scores.accuracy is not None]
    return Row(
        model=model,
        series=series,
        step=step,
        base=every[0][1] if every[0][0] == 0 else None,
        after=after if step else Scores(loss=None, perplexity=None, examples=after.examples),
        best_loss=(min(losses)[1], min(losses)[0]) if losses else None,
        best_accuracy=(min(rights)[1], -min(rights)[0]) if rights else None,
    )


def every_nth(run: Run) -> int:
    """Return how many inner steps stand behind one logged."""
    every = run.config.get("logging.every")
    return every if isinstance(every, int) and every > 0 and not run.simulated else 1


def tokens(run: Run) -> float | None:
    """Return the tokens that all clients trained on, estimated from the logged steps where not every step was
    logged."""
    seen = [step.tokens for step in run.all_steps if step.tokens is not None]
    return sum(seen) * every_nth(run) if seen else None


def training_seconds(run: Run) -> float | None:
    """Return the seconds that the slowest client spent in its inner steps."""
    spent = [
        sum(step.seconds for step in steps if step.seconds is not None) * every_nth(run)
        for steps in run.steps.values()
        if any(step.seconds is not None for step in steps)
    ]
    return max(spent, default=None)


def sent_by_client(run: Run) -> dict[int, float]:
    """Return the bytes that each client has sent to neighbours, since the last start."""
    found = {}
    for client, evaluations in run.evaluations.items():
        sent = [each.sent for each in evaluations if each.sent is not None]
        if sent:
            found[client] = sent[-1]
    return found


def events(run: Run) -> list[Event]:
    """List what happened to the job: starts, clients that went and came, and its end."""
    found = [
        Event(
            start.step,
            start.time,
            "started" if start.step == 0 else f"continued from the checkpoint of step {start.step}",
        )
        for start in run.starts
    ]
    there = set(range(run.clients))
    for change in run.memberships:
        now = set(change.clients)
        said = [f"{named('client', sorted(there - now), _SHOWN)} gone"] if there - now else []
        said += [f"{named('client', sorted(now - there), _SHOWN)} back"] if now - there else []
        gap = f", spectral gap {change.gap:.3g}" if change.gap is not None else ""
        apart = f", in {change.parts} parts that do not reach each other" if change.parts > 1 else ""
        found.append(
            Event(
                change.step,
                change.time,
                f"{' and '.join(said) or 'no change'}: {len(now)} of {run.clients} train{gap}{apart}",
            )
        )
        there = now
    found += [
        Event(
            each.step,
            each.time,
            f"client {each.to} took over the state of {'another' if each.by is None else f'client {each.by}'}",
        )
        for each in run.handovers
    ]
    return sorted(found, key=lambda event: (event.time or 0.0, event.step or 0))


def late(run: Run) -> list[tuple[int, str, int]]:
    """Return (client, neighbour, averagings without it) where there were any."""
    found = []
    for client, evaluations in sorted(run.evaluations.items()):
        skipped = next((each.skipped for each in reversed(evaluations) if each.skipped), {})
        found += [(client, neighbour, times) for neighbour, times in sorted(skipped.items())]
    return found


def activations(run: Run) -> list[tuple[int, int, int, str, float | None]]:
    """Return (first step, last step, round, block, mean loss over clients) of every activation of a block that was
    logged."""
    inner = run.config.get("algorithm.inner_steps")
    length_of = inner if isinstance(inner, int) and inner > 0 else 1
    if len(blocks(run)) == 1:
        return []
    found: dict[int, tuple[int, str, list[float | None]]] = {}
    for step in run.all_steps:
        number = ceil(step.step / length_of) - 1
        found.setdefault(number, (step.round or 0, step.block, []))[2].append(step.loss)
    return [
        (number * length_of + 1, (number + 1) * length_of, round_, block, mean(losses))
        for number, (round_, block, losses) in sorted(found.items())
    ]

"""The tables of a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from deca_ds.tools.report.compare_runs import Gap, changed, clients_scores, gaps
from deca_ds.tools.report.network import Network
from deca_ds.tools.report.records import Run
from deca_ds.tools.report.summary import (
    SETS,
    Row,
    events,
    graph_name,
    late,
    length,
    score_rows,
    sent_by_client,
    state,
    training_seconds,
)
from deca_ds.tools.report.wording import (
    NONE,
    count,
    loss,
    moment,
    percent,
    redact,
    rough_duration,
    setting,
    significant,
    size,
)

_MOST_EDGES = 24


@dataclass(frozen=True)
class Table:
    """head: a name a column. rows: as many texts each. words: the columns that hold words, and not numbers. marks,
    head_marks: for each row or column the name of the series that it tells of, or none."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: frozenset[int] = frozenset({0})
    marks: Sequence[str] = field(default_factory=tuple)
    head_marks: Sequence[str] = field(default_factory=tuple)
    text: str = ""


def scores(run: Run, kind: str) -> Table:
    """Tabulate how every model scores on a kind of set before and after training, and at its best."""
    rows = score_rows(run, kind)
    labelled = any(each and each.accuracy is not None for row in rows for each in (row.base, row.after))
    head = ["model", "loss before", "after", "best (step)"]
    head += ["accuracy before", "after", "best (step)", "macro F1 after"] if labelled else _TOKENS
    last = max((row.step for row in rows), default=0)
    body = [
        [
            row.model if row.step == last else f"{row.model} (until step {count(row.step)})",
            *_losses(row),
            *(_rights(row) if labelled else _tokens(row)),
        ]
        for row in rows
    ]
    examples = next((row.after.examples for row in rows if row.after.examples is not None), None)
    text = f"Loss in nats per target token on {SETS[kind]}" + (
        f", {count(examples)} examples." if kind == "common" and examples else "."
    )
    if rows and last < run.reached:
        text += f" The last evaluation came {f'after inner step {count(last)}' if last else 'before training'}."
    title = "Common evaluation set" if kind == "common" else "Own evaluation sets"
    return Table(title, head, body, marks=[row.series for row in rows], text=text)


def _losses(row: Row) -> list[str]:
    best = f"{loss(row.best_loss[1])} ({count(row.best_loss[0])})" if row.best_loss is not None else NONE
    return [loss(row.base.loss) if row.base is not None else NONE, loss(row.after.loss), best]


def _rights(row: Row) -> list[str]:
    best = f"{percent(row.best_accuracy[1])} ({count(row.best_accuracy[0])})" if row.best_accuracy is not None else NONE
    before = percent(row.base.accuracy) if row.base is not None else NONE
    return [before, percent(row.after.accuracy), best, percent(row.after.macro_f1)]


_TOKENS = ["perplexity after", "token accuracy before", "after", "exact match before", "after"]


def _tokens(row: Row) -> list[str]:
    shares = [
        percent(None if scores is None else share(scores))
        for share in (attrgetter("token_accuracy"), attrgetter("exact_match"))
        for scores in (row.base, row.after)
    ]
    return [significant(row.after.perplexity, 4), *shares]


def data(run: Run) -> Table:
    """Tabulate what each client trains on."""
    sent = sent_by_client(run)
    rows = [
        [
            f"client {share.client}", count(share.train), count(share.train_tokens), count(share.target_tokens),
            count(share.own_evaluation), count(share.common_evaluation), size(sent.get(share.client)),
        ]
        for share in run.data
    ]  # fmt: skip
    head = ["client", "training sequences", "tokens", "target tokens", "own evaluation", "common evaluation", "sent"]
    return Table("Data and traffic", head, rows, marks=[f"c{share.client}" for share in run.data])


def edges(net: Network) -> Table | None:
    """Tabulate the edges, the slowest first."""
    links = [link for link in net.links if link.measured is not None or link.sent]
    if not links:
        return None
    slow = sorted(links, key=lambda link: (link.measured.mb_per_s or 0.0) if link.measured is not None else 0.0)
    rows = [
        [
            f"{link.ends[0]} – {link.ends[1]}",  # noqa: RUF001
            significant(link.measured.round_trip_ms) if link.measured is not None else NONE,
            significant(link.measured.mb_per_s, 4) if link.measured is not None else NONE,
            size(link.sent),
            " – ".join(link.measured.hosts) if link.measured is not None else NONE,  # noqa: RUF001
        ]
        for link in slow[:_MOST_EDGES]
    ]
    text = "As tested at the start, between the slowest pair of ranks." if any(link.measured for link in links) else ""
    if len(slow) > _MOST_EDGES:
        text += f" The slowest {_MOST_EDGES} of {len(slow)} edges."
    return Table(
        "Edges",
        ["clients", "round trip, ms", "MB/s", "sent, both ways", "hosts"],
        rows,
        frozenset({0, 4}),
        text=text.strip(),
    )


def happenings(run: Run) -> Table | None:
    """Tabulate what happened to the job."""
    rows = [[count(each.step), each.what, moment(each.time)] for each in events(run)]
    return Table("Events", ["inner step", "what", "when"], rows, frozenset({0, 1, 2})) if rows else None


def latecomers(run: Run) -> Table | None:
    """Tabulate the neighbours that were left out of averagings because they were late."""
    rows = [[f"client {client}", f"client {neighbour}", count(times)] for client, neighbour, times in late(run)]
    return Table("Late neighbours", ["client", "averaged without", "times"], rows, frozenset({0, 1})) if rows else None


def settings(run: Run, defaults: dict[str, Any]) -> list[Table]:
    """Tabulate the keys that were set, and all of them."""
    own = [[key, value, default] for key, value, default in changed(run, defaults)]
    every = [[key, setting(key, value)] for key, value in run.config.items()]
    return [
        Table("Set for this run", ["key", "value", "default"], own, frozenset({0, 1, 2})),
        Table("All keys", ["key", "value"], every, frozenset({0, 1})),
    ]


def versions(run: Run) -> Table | None:
    """Tabulate what the job ran on, start by start."""
    if not run.starts:
        return None
    names = list(dict.fromkeys(name for start in run.starts for name in start.software if name != "keys"))
    rows = [[name, *(redact(start.software.get(name, NONE)) for start in run.starts)] for name in names]
    rows += [["device", *(redact(start.device) for start in run.starts)]]
    rows += [["transport", *(start.transport or NONE for start in run.starts)]]
    rows += [["ranks of the clients", *(_ranks(start.ranks) for start in run.starts)]]
    head = ["", *("version" if len(run.starts) == 1 else f"start at step {start.step}" for start in run.starts)]
    return Table("Versions", head, rows, frozenset(range(len(head))))


def _ranks(ranks: Sequence[int]) -> str:
    if not ranks:
        return NONE
    return f"{ranks[0]} each" if len(set(ranks)) == 1 else ", ".join(map(str, ranks))


def overview(runs: Sequence[Run], nets: Sequence[Network]) -> Table:
    """Tabulate the runs, a column for each. Lines that say nothing of any run are left out."""
    closed = gaps(runs)
    columns = [_column(*each) for each in zip(runs, nets, closed, strict=True)]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    text = (
        "Loss and accuracy: the mean over the clients after training, on the common evaluation set where there is one."
    )
    text += _best(runs)
    bracket = next((gap for gap in closed if gap is not None), None)
    if bracket is not None:
        text += (
            f" Gap closed: 0% as with every client alone ({bracket.alone}), 100% as with all data in one place "
            f"({bracket.central})."
        )
    return Table(
        "Runs",
        ["", *(run.name for run in runs)],
        [row for row in rows if set(row[1:]) != {NONE}],
        head_marks=["", *(f"r{place}" for place in range(len(runs)))],
        text=text,
    )


def _best(runs: Sequence[Run]) -> str:
    """Say which run is best, if all runs have the same kind of scores."""
    finals = [(run.name, scores) for run in runs if (scores := clients_scores(run)) is not None]
    losses = [(scores.loss, name) for name, scores in finals if scores.loss is not None]
    rights = [(-scores.accuracy, name) for name, scores in finals if scores.accuracy is not None]
    said = ""
    if len({run.kinds[:1] == ["common"] for run in runs}) == 1 and len(losses) == len(runs):
        said += f" Lowest loss: {min(losses)[1]}, {loss(min(losses)[0])}."
        said += f" Highest accuracy: {min(rights)[1]}, {percent(-min(rights)[0])}." if len(rights) == len(runs) else ""
    return said


def _column(run: Run, net: Network, gap: Gap | None) -> dict[str, str]:
    """Return the column of a run in the comparison with others."""
    final = clients_scores(run)
    means = [scores for _, scores in run.mean_scores]
    distances = [each.distance for each in run.together if each.distance is not None]
    sent, total, several = sent_by_client(run), length(run), run.clients > 1
    return {
        "state": state(run)[0],
        "method": str(run.config.get("algorithm.method")),
        "graph": graph_name(run) if several else NONE,
        "spectral gap": significant(net.gap) if several else NONE,
        "clients": count(run.clients),
        "inner steps": f"{count(run.reached)} of {count(total)}" if total else count(run.reached),
        "loss": loss(final.loss if final is not None else None),
        "token accuracy": percent(final.token_accuracy if final is not None else None),
        "exact match": percent(final.exact_match if final is not None else None),
        "accuracy": percent(final.accuracy if final is not None else None),
        "loss of the mean model": loss(means[-1].loss if means else None),
        "accuracy of the mean model": percent(means[-1].accuracy if means else None),
        "gap closed, in loss": NONE if gap is None or gap.loss is None else f"{gap.loss:.0%}",
        "gap closed, in accuracy": NONE if gap is None or gap.accuracy is None else f"{gap.accuracy:.0%}",
        "consensus distance": significant(distances[-1] if distances and several else None),
        "sent by a client": size(max(sent.values())) if any(sent.values()) else NONE,
        "training time": rough_duration(training_seconds(run)),
    }

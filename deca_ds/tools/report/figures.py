"""The figures of a run that are no curves: labels, data, the graph, blocks, membership, time and memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from deca_ds.tools.report import charts
from deca_ds.tools.report.charts import Figure, Spec, Value
from deca_ds.tools.report.curves import SINGLE, logged
from deca_ds.tools.report.network import Network
from deca_ds.tools.report.records import Run, Scores
from deca_ds.tools.report.summary import SETS, activations, blocks, every_nth, length, score_rows
from deca_ds.tools.report.wording import NONE, count, loss, percent, short, significant, size
from deca_ds.training.scores import MEAN_MODEL

_MOST_LABELS = 40
_MOST_FRAMED = 16  # labels of a matrix that shows its zeros, too
_MOST_MATRICES = 9
_MOST_SPANS = 1500
_MOST_BARS = 128

Cells = list[dict[str, Value]]


def recall(run: Run) -> list[Figure]:
    """Draw the recall by label of every model after training."""
    found = []
    for kind in run.kinds:
        rows = [row for row in score_rows(run, kind) if row.after.recall]
        if not rows:
            continue
        every = {label for row in rows for label in row.after.recall}
        labels = _first(every)
        models = [(row.model, row.after) for row in rows]
        base = next((row.base for row in rows if row.base is not None), None)
        if base is not None and kind == "common":  # the same for all
            models.insert(0, ("base", base))
        cells: Cells = [
            {
                "row": model, "column": label, "share": round(share, 4), "text": f"{share:.0%}",
                "exact": percent(share), "trained": _trained_on(run, model, label),
            }
            for model, scores in models
            for label in labels
            if (share := scores.recall.get(label)) is not None
        ]  # fmt: skip
        shown = {"row": "model", "column": "label", "exact": "recall", "trained": "training examples of it"}
        spec = charts.heat_map(cells, across="label", down="", columns=labels, rows=[m for m, _ in models], shown=shown)
        text = f"Share of a label's examples that a model answers right, after training, on {SETS[kind]}."
        found.append(Figure("Recall by label", text + _cut(every), spec))
    return found


def confusion(run: Run) -> list[Figure]:
    """Draw which label is taken for which after training, by the mean model, and by the clients' models."""
    found = []
    for kind in run.kinds:
        rows = [row for row in score_rows(run, kind) if row.after.confusion]
        text = f"Examples by right label and answer, after training, on {SETS[kind]}."
        for row in rows[:_MOST_MATRICES]:
            labels = sorted({label for pair in row.after.confusion for label in pair} | set(row.after.recall))
            if len(labels) <= _MOST_LABELS:
                found.append(Figure(f"Confusion: {row.model}", text, _matrix(row.after, labels), size="small"))
    return found


def _matrix(scores: Scores, labels: Sequence[str]) -> Spec:
    totals = {right: sum(n for (own, _), n in scores.confusion.items() if own == right) for right in labels}
    framed = len(labels) <= _MOST_FRAMED
    cells: Cells = [
        {
            "row": right, "column": answer, "share": round(n / totals[right], 4) if n else 0,
            "text": short(n) if n else "", "count": count(n), "part": percent(n / totals[right]) if n else percent(0),
        }
        for right in labels
        for answer in labels
        if (n := scores.confusion.get((right, answer), 0)) or framed
    ]  # fmt: skip
    shown = {"row": "right label", "column": "answer", "count": "examples", "part": "of this label"}
    return charts.heat_map(
        cells, across="answer", down="right label", columns=labels, rows=labels, shown=shown, step=28
    )


def _trained_on(run: Run, model: str, label: str) -> str:
    numbers = {f"client {share.client}": share.labels.get(label, 0) for share in run.data}
    if not run.counts_labels:
        numbers.clear()
    if model == MEAN_MODEL and numbers:
        return count(sum(numbers.values()))
    return count(numbers.get(model))


def partition(run: Run) -> list[Figure]:
    """Draw which client has how many examples of which label."""
    rows = [f"client {share.client}" for share in run.data]
    every = {label for share in run.data for label in share.labels}
    if not every:
        values: Cells = [
            {"row": row, "part": "target tokens", "value": share.target_tokens}
            for row, share in zip(rows, run.data, strict=True)
        ]
        spec = charts.bars(values[:_MOST_BARS], parts=["target tokens"], title="target tokens", numbers=",d")
        return [Figure("Who has how much", "Tokens that carry loss in a client's data.", spec)] if run.data else []
    labels = _first(every)
    cells: Cells = []
    for row, share in zip(rows, run.data, strict=True):
        total = sum(share.labels.values())
        for label in labels:
            part = share.labels.get(label, 0) / total if total else 0.0
            n = share.labels.get(label, 0)
            cells.append({"row": row, "column": label, "share": round(part, 4), "text": short(n)})
            cells[-1] |= {"count": count(n), "part": percent(part)}
    by = run.grouped_by
    shown = {"row": "client", "column": by, "count": "training examples", "part": "of the client's"}
    spec = charts.heat_map(cells, across=by, down="", columns=labels, rows=rows, shown=shown)
    text = f"Training examples by client and {by}; the stronger the colour, the larger their share of the client's."
    return [Figure("Who has what", text + _cut(every), spec)]


def graph(run: Run, net: Network) -> list[Figure]:
    """Draw the clients, with their edges as wide as what they have carried."""
    if run.clients == 1:
        return []
    few = run.clients <= SINGLE
    shown = {"client": "client", "state": "at the end", "sequences": "training sequences", "loss": "evaluation loss"}
    of_edge = {"edge": "edge", "sent": "sent, both ways", "trip": "round trip", "speed": "speed", "hosts": "hosts"}
    spec = charts.graph(_nodes(run, net, few), _edges(net, few), shown=shown, shown_of_edge=of_edge)
    wide = " A wider edge has carried more." if any(link.sent for link in net.links) else ""
    return [Figure("Graph", f"{net.summary}.{wide}", spec)]


def _nodes(run: Run, net: Network, few: bool) -> Cells:
    """Return a node a client, with what is said where the reader points. few: colours and large nodes for all."""
    shares = {share.client: share for share in run.data}
    there = run.members(run.reached)
    nodes: Cells = []
    for client, (x, y) in enumerate(net.places):
        scored = [scores for kind in run.kinds[:1] for _, scores in run.scores(client, kind)]
        nodes.append(
            {
                "x": x, "y": y, "name": str(client) if run.clients <= 2 * SINGLE else "", "client": f"client {client}",
                "colour": f"var(--c{client % charts.COLOURS if few else 0})" if client in there else "var(--edge)",
                "state": "there" if client in there else "gone",
                "size": 700 if few else 260 if run.clients <= 2 * SINGLE else 60,
                "sequences": count(shares[client].train) if client in shares else NONE,
                "loss": loss(scored[-1].loss) if scored else NONE,
            }
        )  # fmt: skip
    return nodes


def _edges(net: Network, few: bool) -> Cells:
    """Return the edges, as wide as what they have carried."""
    most = max((link.sent or 0.0 for link in net.links), default=0.0)
    edges: Cells = []
    for link in net.links:
        (x, y), (x2, y2) = (net.places[end] for end in link.ends)
        width = 1.5 + 4.5 * (link.sent or 0.0) / most if most else 2.0
        edge = link.measured
        edges.append(
            {
                "x": x, "y": y, "x2": x2, "y2": y2, "width": round(width if few else width / 3, 2),
                "edge": f"client {link.ends[0]} and client {link.ends[1]}", "sent": size(link.sent),
                "trip": f"{significant(edge.round_trip_ms)} ms" if edge is not None else NONE,
                "speed": f"{significant(edge.mb_per_s)} MB/s" if edge is not None else NONE,
                "hosts": " and ".join(edge.hosts) if edge is not None else NONE,
            }
        )  # fmt: skip
    return edges


def timeline(run: Run) -> list[Figure]:
    """Draw which block was active when."""
    every = activations(run)
    spans = every[:_MOST_SPANS]
    if not spans:
        return []
    losses = [value for *_, value in spans if value is not None]
    low, high = min(losses, default=0.0), max(losses, default=0.0)
    values: Cells = [
        {
            "row": block, "from": first - 1, "to": last, "steps": f"{first} to {last}", "round": f"{number + 1}",
            "loss": loss(value),
            "share": round((value - low) / (high - low), 4) if value is not None and high > low else 0,
        }
        for first, last, number, block, value in spans
    ]  # fmt: skip
    shown = {"row": "block", "round": "round", "steps": "inner steps", "loss": "mean loss of the clients"}
    text = "Which block trains when; the stronger the colour, the higher the clients' training loss."
    if len(every) > len(spans):
        text += f" The first {len(spans)} of {len(every)} activations."
    rows = [block for block in blocks(run) if any(block == span["row"] for span in values)]
    spec = charts.timeline(values, rows=rows, shown=shown, last=max(length(run) or 0, spans[-1][1]))
    return [Figure("Active blocks", text, spec, size="wide")]


def membership(run: Run) -> list[Figure]:
    """Draw who trained when, where clients went or came."""
    if not run.memberships:
        return []
    last = max(run.reached, 1)
    changes = [(1, frozenset(range(run.clients)))]
    changes += [(change.step, frozenset(change.clients)) for change in run.memberships]
    changes.append((last + 1, frozenset()))
    spans: Cells = []
    for client in range(run.clients):
        begun: int | None = None
        for step, there in changes:
            if client in there and begun is None:
                begun = step
            elif client not in there and begun is not None:
                if step > begun:
                    spans.append({"row": f"client {client}", "from": begun - 1, "to": step - 1, "share": 0.6})
                    spans[-1]["steps"] = f"{begun} to {step - 1}"
                begun = None
    rows = [f"client {client}" for client in range(run.clients)]
    shown = {"row": "client", "steps": "inner steps"}
    spec = charts.timeline(spans, rows=rows, shown=shown, last=max(length(run) or 0, last))
    return [Figure("Who trained when", "The inner steps that each client did with the others.", spec, size="wide")]


def time(run: Run) -> list[Figure]:
    """Draw the seconds of each client by phase."""
    parts = ("gradient and update", "waiting for neighbours", "evaluation")
    values: Cells = []
    for client, steps in sorted(run.steps.items()):
        spent = sum(step.seconds for step in steps if step.seconds is not None) * every_nth(run)
        waited = sum(step.waited for step in steps if step.waited is not None) * every_nth(run)
        scored = sum(each.seconds for each in run.evaluations.get(client, ()) if each.seconds is not None)
        for part, value in zip(parts, (max(0.0, spent - waited), waited, scored), strict=True):
            if spent and value:
                values.append({"row": f"client {client}", "part": part, "value": round(value, 4)})
    if not values:
        return []
    there = [part for part in parts if any(value["part"] == part for value in values)]
    text = "Seconds of each client" + (f", estimated from its steps{logged(run)}" if logged(run) else "") + "."
    return [Figure("Time by phase", text, charts.bars(values[:_MOST_BARS], parts=there, title="seconds"))]


def memory(run: Run) -> list[Figure]:
    """Draw the peak of every rank since its start, and which phase has raised it."""
    since = run.starts[-1].step if run.starts else 0
    values: Cells = []
    for client, evaluations in sorted(run.evaluations.items()):
        scored = [each for each in evaluations if each.step >= since and each.after]
        if not scored:
            continue
        first, last = scored[0], scored[-1]
        marks = [("start and loading", first.before), ("first evaluation", first.after)]
        if last.step > first.step:
            marks += [("training", last.before), ("later evaluations", last.after)]
        for rank in range(len(first.after)):
            peak = 0.0
            for part, reached in marks:
                if rank < len(reached):
                    added, peak = max(0.0, reached[rank] - peak), max(peak, reached[rank])
                    row = f"client {client}, rank {rank}"
                    values.append({"row": row, "part": part, "value": round(added / 2**30, 5)})
    if not values:
        return []
    parts = list(dict.fromkeys(str(value["part"]) for value in values))
    text = (
        "The peak of every rank since its start, and what each phase has added to it: GPU memory as torch counts it, "
        "or the resident memory of the process."
    )
    spec = charts.bars(values[: 4 * _MOST_BARS], parts=parts, title="peak memory, GiB")
    return [Figure("Memory by phase", text, spec)]


def _first(labels: Iterable[str]) -> list[str]:
    return sorted(labels)[:_MOST_LABELS]


def _cut(labels: set[str]) -> str:
    return f" The first {_MOST_LABELS} of {len(labels)} labels." if len(labels) > _MOST_LABELS else ""

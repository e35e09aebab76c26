"""From JSON to a report's records. What is missing or of another type becomes None, 0 or empty: files may be torn, of
another version, or no run's at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from deca_ds.tools.report import records

Line = Mapping[str, Any]

_LARGEST = 1e300


def of_client(line: Line, client: int) -> dict[str, Any]:
    """Return what a simulation's line, which is of all clients, says of one of them."""
    own = {key: value for key, value in line.items() if key not in ("clients", "loss", "bytes_sent")}
    for key, name in (("loss", "loss"), ("bytes_sent", "gossip_bytes_sent")):
        values = line.get(key)
        if isinstance(values, list) and client < len(values):
            own[name] = values[client]
    scores = line.get("clients")
    if isinstance(scores, list) and client < len(scores) and isinstance(scores[client], dict):
        own |= scores[client]
    return own


def steps(lines: Sequence[Line]) -> list[records.Step]:
    """Return the inner steps in a file of metrics, each once, in order."""
    found = {}
    for line in lines:
        if line.get("kind") != "step":
            continue
        step = whole(line["step"])
        found[step] = records.Step(
            step=step,
            round=count(line.get("round")),
            block=str(line.get("block", "")),
            lr=number(line.get("lr")),
            loss=number(line.get("loss")),
            norm=number(line.get("norm")),
            seconds=number(line.get("seconds")),
            waited=number(line.get("gossip_wait_seconds")),
            tokens=number(line.get("tokens")),
        )
    return [found[step] for step in sorted(found)]  # the last one of a step that was done again


def evaluations(lines: Sequence[Line]) -> list[records.Evaluation]:
    """Return a client's evaluations in a file of metrics, each once, in order."""
    found = {}
    for line in lines:
        if line.get("kind") != "evaluation":
            continue
        step = whole(line["step"])
        skipped = line.get("gossip_skipped")
        found[step] = records.Evaluation(
            step=step,
            own=_scores(line.get("own")),
            common=_scores(line.get("common")),
            seconds=number(line.get("seconds")),
            before=_numbers(line.get("peak_memory_bytes_by_rank_before")),
            after=_numbers(line.get("peak_memory_bytes_by_rank")),
            sent=number(line.get("gossip_bytes_sent")),
            skipped={str(key): whole(value) for key, value in skipped.items()} if isinstance(skipped, dict) else {},
        )
    # a simulation counts what it sent in its steps
    counted = {
        whole(line["step"]): number(line.get("gossip_bytes_sent")) for line in lines if line.get("kind") == "step"
    }
    every = [found[step] for step in sorted(found)]
    return [each if each.sent is not None else replace(each, sent=counted.get(each.step)) for each in every]


def together(lines: Sequence[Line]) -> list[records.Together]:
    """Return what the evaluations in the job's metrics say of all clients together."""
    found = {}
    for line in lines:
        if line.get("kind") == "evaluation":
            step = whole(line["step"])
            found[step] = records.Together(step, _scores(line.get("mean")), number(line.get("consensus_distance")))
    return [found[step] for step in sorted(found)]


def _scores(value: Any) -> records.Scores | None:
    if not isinstance(value, dict) or not value:
        return None
    recall = value.get("recall")
    confusion = {
        (str(entry[0]), str(entry[1])): whole(entry[2])
        for entry in listed(value.get("confusion"))
        if isinstance(entry, list) and len(entry) == 3 and whole(entry[2]) > 0
    }
    return records.Scores(
        loss=number(value.get("loss")),
        perplexity=number(value.get("perplexity")),
        examples=count(value.get("examples")),
        token_accuracy=number(value.get("token_accuracy")),
        exact_match=number(value.get("exact_match")),
        accuracy=number(value.get("accuracy")),
        macro_f1=number(value.get("macro_f1")),
        recall={
            str(label): share
            for label, of in (recall.items() if isinstance(recall, dict) else ())
            if (share := number(of)) is not None
        },
        confusion=confusion,
    )


def membership(line: Line) -> records.Membership:
    return records.Membership(
        step=whole(line.get("from_step", line["step"])),
        clients=tuple(whole(client) for client in listed(line.get("clients"))),
        gap=number(line.get("spectral_gap")),
        parts=len(listed(line.get("parts"))),
        time=number(line.get("time")),
    )


def handover(line: Line) -> records.Handover:
    return records.Handover(
        step=whole(line.get("from_step", line["step"])),
        to=whole(line.get("to")),
        by=count(line.get("by")),
        time=number(line.get("time")),
    )


def start(entry: Line) -> records.Start:
    model = entry.get("model")
    model = model if isinstance(model, dict) else {}
    software = entry.get("software")
    pairs = [pair for pair in listed(model.get("blocks")) if isinstance(pair, list) and len(pair) == 2]
    return records.Start(
        step=whole(entry.get("step")),
        rounds=count(entry.get("rounds")),
        time=number(entry.get("time")),
        ranks=tuple(whole(ranks) for ranks in listed(entry.get("ranks"))),
        device=str(entry.get("device", "")),
        transport=str(entry.get("transport", "")),
        method=str(entry.get("method", "")),
        papers=tuple(str(paper) for paper in listed(entry.get("papers"))),
        software={str(key): str(value) for key, value in software.items()} if isinstance(software, dict) else {},
        architecture=str(model.get("architecture", "")),
        parameters=count(model.get("parameters")),
        blocks={str(label): whole(numel) for label, numel in pairs},
    )


def edge(entry: Line) -> records.Edge | None:
    """Return an edge that was tested at the start, as its slowest ranks were; None if the entry names no two ends."""
    ends, hosts = listed(entry.get("clients")), listed(entry.get("hosts"))
    shards = [shard for shard in listed(entry.get("shards")) if isinstance(shard, dict)]
    if len(ends) != 2 or len(hosts) != 2:
        return None
    trips = [trip for shard in shards if (trip := number(shard.get("round_trip_ms"))) is not None]
    speeds = [speed for shard in shards if (speed := number(shard.get("mb_per_s"))) is not None]
    return records.Edge(
        clients=(whole(ends[0]), whole(ends[1])),
        hosts=(str(hosts[0]), str(hosts[1])),
        round_trip_ms=max(trips, default=None),
        mb_per_s=min(speeds, default=None),
    )


def share(place: int, entry: Line) -> records.Share:
    """Return what a client has of the data. place: of the entry, which older files have in the place of a number."""
    labels = entry.get("labels")
    client = count(entry.get("client"))
    return records.Share(
        client=place if client is None else client,
        labels={str(label): whole(number) for label, number in labels.items()} if isinstance(labels, dict) else {},
        **{
            key: whole(entry.get(key))
            for key in ("train", "examples", "own_evaluation", "common_evaluation", "train_tokens", "target_tokens")
        },
    )


def number(value: Any) -> float | None:
    """Return the number; None for what is no finite number, or too large for one."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LARGEST:
        return None
    return value


def count(value: Any) -> int | None:
    """Return the number without decimals; None as `number`."""
    found = number(value)
    return None if found is None else int(found)


def whole(value: Any) -> int:
    """Return the number without decimals; 0 where there is none."""
    return count(value) or 0


def listed(value: Any) -> list[Any]:
    """Return the list; an empty one for anything else."""
    return value if isinstance(value, list) else []


def _numbers(value: Any) -> tuple[float, ...]:
    every = [number(each) for each in listed(value)]
    return tuple(each for each in every if each is not None)

"""The graph of a run: who averages with whom, how well that mixes, and what each edge carries."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from deca_ds.config.schema import GossipConfig
from deca_ds.errors import UserError
from deca_ds.gossip import MixingSchedule, build_mixing
from deca_ds.tools.report.records import Edge, Run
from deca_ds.tools.report.summary import graph_name, sent_by_client

_MOST_CLIENTS = 256  # for whom mixing matrices are made


@dataclass(frozen=True)
class Link:
    """An edge between two clients. sent: bytes both ways, where the run's files tell."""

    ends: tuple[int, int]
    sent: float | None
    measured: Edge | None


@dataclass(frozen=True)
class Network:
    """places: of the clients, in the unit square. summary: the graph in words. gap: the spectral gap, or None."""

    places: tuple[tuple[float, float], ...]
    links: tuple[Link, ...]
    summary: str
    gap: float | None


def network(run: Run) -> Network:
    """Describe the graph of all clients of the configuration. Where it cannot be made again, because a file is gone or
    it is of another version, the edges that were tested at the start stand for it."""
    mixing = _mixing(run)
    measured = {tuple(sorted(edge.clients)): edge for edge in run.edges}
    if mixing is None:
        ends = sorted(measured)
        summary, gap = f"{graph_name(run)}: its file is not there to be read again", None
    else:
        ends = sorted({(min(i, j), max(i, j)) for i in range(run.clients) for j in mixing.neighbours(i)})
        summary, gap = mixing.summary(), mixing.spectral_gap
    links = tuple(
        Link((i, j), _sent(run, mixing, i, j), measured.get((i, j)))
        for i, j in ends
        if 0 <= i < run.clients and 0 <= j < run.clients
    )
    return Network(_places(run), links, summary, gap)


def _mixing(run: Run) -> MixingSchedule | None:
    if run.clients > _MOST_CLIENTS:
        return None
    known = {field.name for field in fields(GossipConfig)}
    values = {key.partition(".")[2]: value for key, value in run.config.items() if key.startswith("gossip.")}
    seed = run.config.get("run.seed")
    try:
        config = GossipConfig(**{key: value for key, value in values.items() if key in known})
        return build_mixing(config, run.clients, seed if isinstance(seed, int) else 0)
    except (UserError, TypeError):  # TypeError: values that no run could have had
        return None


def _sent(run: Run, mixing: MixingSchedule | None, i: int, j: int) -> float | None:
    """Return the bytes between two clients: a client sends the same to all of its neighbours at an averaging, and over
    a period to each its share."""
    if mixing is None:
        return None
    sent = sent_by_client(run)
    total = 0.0
    for one, other in ((i, j), (j, i)):
        every = [destination for t in range(mixing.period) for destination in mixing.destinations(one, t)]
        if one not in sent:
            return None
        total += sent[one] * every.count(other) / max(1, len(every))
    return total


def _places(run: Run) -> tuple[tuple[float, float], ...]:
    """Place the clients on a circle, client 0 at the top; the hub of a star is in the middle."""
    n, star = run.clients, run.config.get("gossip.graph") == "star" and run.clients > 2
    around = n - star
    places = [(0.0, 0.0)] if star else []
    for place in range(around):
        angle = 2 * math.pi * place / max(1, around)
        places.append((round(math.sin(angle), 4), round(math.cos(angle), 4)))
    return tuple(places)

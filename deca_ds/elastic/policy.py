"""The failure policy: whether the job continues with the clients that are left; depends on the view and the graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from deca_ds.config.schema import ClusterConfig
from deca_ds.errors import ConfigError
from deca_ds.gossip import MixingSchedule, subset
from deca_ds.launch.view import View
from deca_ds.plural import named


class Action(Enum):
    """What the job does. CONTINUE: keep training. STOP: save a checkpoint after this inner step, and end. REJOIN: stop
    in the same way, then try for cluster.return_s to rejoin the others."""

    CONTINUE = auto()
    STOP = auto()
    REJOIN = auto()


@dataclass(frozen=True)
class Situation:
    """What a verdict depends on. view: the clients in the job. parts: these clients, in the groups that the graph still
    connects. larger_part: whether a larger part of a split network is in reach again (network_partition.py)."""

    view: View
    parts: Sequence[Sequence[int]]
    larger_part: bool = False


@dataclass(frozen=True)
class Verdict:
    """What to do. why: what to print beside the members; may be empty."""

    action: Action
    why: str = ""


def decide(now: Situation, config: ClusterConfig) -> Verdict:
    """Return the verdict for a situation. All ranks see the same situation, so they reach the same verdict."""
    view = now.view
    if now.larger_part:
        clients = named("client", sorted(view.clients))
        return Verdict(Action.REJOIN, f"the larger part of the network is in reach again: {clients} will rejoin it")
    if len(view) < config.min_clients:
        action = Action.REJOIN if config.return_s > 0 else Action.STOP
        return Verdict(action, f"{len(view)} of {view.total} are left, fewer than cluster.min_clients: stopping")
    if len(now.parts) > 1:
        torn = f"{' and '.join(map(str, now.parts))} do not reach each other any more"
        if config.on_partition == "continue":
            return Verdict(Action.CONTINUE, f"{torn}: each part continues by itself")
        return Verdict(Action.STOP, f"{torn}: stopping")
    return Verdict(Action.CONTINUE)


def check_absent(config: ClusterConfig, mixing: MixingSchedule) -> None:
    """Raise ConfigError if the job would stop at once, because without cluster.absent the graph is not connected."""
    there = [client for client in range(mixing.size) if client not in config.absent]
    parts = subset.parts(subset.without(mixing, config.absent), there)
    starts = Situation(View(0, tuple(there), mixing.size), parts)
    if config.absent and decide(starts, config).action is not Action.CONTINUE:
        raise ConfigError(
            f"without those of cluster.absent = {list(config.absent)} the graph falls into "
            f"{' and '.join(map(str, parts))}",
            where="cluster.absent",
            fix="choose another graph, or let each part train by itself with cluster.on_partition=continue",
        )

"""What gossip sends, from the schedule of a run and its graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from deca_ds.algorithm import Schedule
from deca_ds.gossip import MixingSchedule


@dataclass(frozen=True)
class Traffic:
    """Bytes that gossip sends. averaging: in one averaging of the largest block over an edge, in one direction. edge:
    the same per inner step, on average over blocks and steps. client: by the busiest client per inner step, on average.
    run_client: by that client in the whole run. run: by all clients in the whole run."""

    averaging: int
    edge: float
    client: float
    run_client: float
    run: float


def traffic(bytes_of_blocks: Sequence[int], schedule: Schedule, mixing: MixingSchedule) -> Traffic:
    """Compute the traffic of a run. bytes_of_blocks: what an averaging of each block sends over an edge. Where the
    graph changes from one averaging to the next, an edge is one of those that an averaging uses."""
    steps = len(schedule)
    each = ceil(schedule.activation_steps / schedule.gossip_every)  # averagings of an activation
    activations = steps // (schedule.activation_steps * schedule.blocks)
    edge = each * activations * sum(bytes_of_blocks)
    degrees = [
        sum(len(mixing.destinations(client, t)) for t in range(mixing.period)) / mixing.period
        for client in range(mixing.size)
    ]
    busiest = edge * max(degrees)
    return Traffic(max(bytes_of_blocks), edge / steps, busiest / steps, busiest, edge * sum(degrees))

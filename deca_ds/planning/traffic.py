"""What gossip sends, and how long a run is, from its schedule and its graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from deca_ds.algorithm.schedule import Schedule
from deca_ds.gossip.schedule import MixingSchedule


@dataclass(frozen=True)
class Traffic:
    """Bytes. averaging: what one averaging of the largest block sends over an edge, in one direction. edge: the same
    on average over blocks and inner steps. client: what the busiest client sends a step, on average. run_client: in the
    whole run. run: of all clients."""

    averaging: int
    edge: float
    client: float
    run_client: float
    run: float


def traffic(bytes_of_blocks: Sequence[int], schedule: Schedule, mixing: MixingSchedule) -> Traffic:
    """bytes_of_blocks: what an averaging of each block sends over an edge. Where the graph changes from one averaging
    to the next, an edge is one of those that an averaging uses."""
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


@dataclass(frozen=True)
class Length:
    """Of the run of one client. sequences: that it trains on, with repetition. tokens: at most. epochs: of the client
    with the most and of the one with the fewest examples; None where they are not known."""

    steps: int
    sequences: int
    tokens: int
    epochs: tuple[float, float] | None


def length(schedule: Schedule, batch_size: int, max_length: int, examples: Sequence[int]) -> Length:
    """batch_size: sequences of a step. max_length: tokens of a sequence. examples: of each client, if known."""
    sequences = len(schedule) * batch_size
    epochs = (sequences / max(examples), sequences / min(examples)) if examples and min(examples) else None
    return Length(len(schedule), sequences, sequences * max_length, epochs)

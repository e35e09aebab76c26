"""How long a run is: in rounds, in epochs of the clients' data, in sequences and in tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from deca_ds.algorithm.schedule import Schedule
from deca_ds.config import Config

ANY_ROUNDS = 2  # stands for what algorithm.epochs comes to, where it makes no difference: more take no more disk
MANY_TIMES = 30  # over a client's data: far more than the few that fine-tuning takes
_ROUNDING = 1e-9  # of a round


def count_rounds(config: Config, blocks: int, rows: Sequence[int]) -> int:
    """algorithm.rounds, or what algorithm.epochs comes to, rounded up. rows: training sequences of each client.

    An epoch is as many sequences, over all clients, as all clients have: every client makes equally many steps, so one
    with less data than the mean goes over it more often than algorithm.epochs says, and one with more less often.
    """
    algorithm = config.algorithm
    if algorithm.rounds is not None:
        return algorithm.rounds
    assert algorithm.epochs is not None, "`load_config` sees to that"
    in_a_round = len(rows) * config.data.batch_size * blocks * algorithm.inner_steps
    return max(1, math.ceil(algorithm.epochs * sum(rows) / in_a_round - _ROUNDING))


def tell_length(config: Config, schedule: Schedule, summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines for the user: the run's length in epochs, sequences and tokens, and a warning where a client goes over its
    data very often. summaries: `ClientData.summary` of every client."""
    drawn = len(schedule) * config.data.batch_size
    passes = {each["client"]: drawn / each["train"] for each in summaries}
    tokens = sum(round(passes[each["client"]] * each["train_tokens"]) for each in summaries)
    epochs = len(summaries) * drawn / sum(each["train"] for each in summaries)
    asked = ""
    if config.algorithm.epochs is not None:
        asked = f" (algorithm.epochs={config.algorithm.epochs:g}, in whole rounds of {epochs / schedule.rounds:.3g})"
    line = f"length: {epochs:.3g} epochs{asked}, {len(summaries) * drawn:,} sequences, about {tokens:,} tokens"
    fewest, most = min(passes.values()), max(passes.values())
    if len(passes) > 1:
        often = f"{most:.3g}" if f"{fewest:.3g}" == f"{most:.3g}" else f"{fewest:.3g} to {most:.3g}"
        line += f" of all clients; a client goes over its data {often} times"
    lines = [line]
    if most > MANY_TIMES:
        client = max(passes, key=passes.__getitem__)
        held = next(each["train"] for each in summaries if each["client"] == client)
        lines.append(
            f"WARNING: client {client} goes over its {held} training sequences {most:.3g} times and will know them by "
            f"heart. {_shorter(schedule, most)}"
        )
    return lines


def _shorter(schedule: Schedule, passes: float) -> str:
    if schedule.rounds > 1 and passes / schedule.rounds <= MANY_TIMES:
        return "Lower algorithm.rounds, or set algorithm.epochs instead"
    return f"One round is {passes / schedule.rounds:.3g} times: lower algorithm.inner_steps, or data.batch_size"

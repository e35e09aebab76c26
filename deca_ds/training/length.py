"""How long a run is: in rounds, in epochs of the clients' data, in sequences and in tokens; and continuing with another
length than it had."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deca_ds.algorithm import Schedule
from deca_ds.config import Config
from deca_ds.engine.state import position
from deca_ds.errors import CheckpointError, ConfigError
from deca_ds.training.chosen_method import step_learning_rate

ANY_ROUNDS = 2  # stands for an unknown number of rounds: more than two take no more disk
MANY_TIMES = 30  # over a client's data: far more than the few that fine-tuning takes
_ROUNDING = 1e-9  # of a round


def count_rounds(config: Config, blocks: int, rows: Sequence[int]) -> int:
    """Return algorithm.rounds, or the rounds in algorithm.epochs, rounded up. rows: training sequences of each client.

    An epoch is as many sequences, over all clients, as all clients have: every client makes equally many steps, so one
    with less data than the mean goes over it more often than algorithm.epochs says, and one with more less often.
    """
    algorithm = config.algorithm
    if algorithm.rounds is not None:
        return algorithm.rounds
    assert algorithm.epochs is not None, "`load_config` sees to that"
    in_a_round = len(rows) * config.data.batch_size * blocks * algorithm.inner_steps
    return max(1, math.ceil(algorithm.epochs * sum(rows) / in_a_round - _ROUNDING))


@dataclass(frozen=True)
class Length:
    """The length of a run. sequences: of all clients, with repetition. passes: by client, how often it goes over its
    data. tokens, epochs: of all clients. Empty or None where the data are not known."""

    rounds: int
    steps: int
    sequences: int
    passes: dict[int, float]
    tokens: int | None
    epochs: float | None


def length_of(config: Config, schedule: Schedule, summaries: Sequence[Mapping[str, Any]]) -> Length:
    """Return the length of a run. summaries: `ClientData.summary` of every client, or none if they are not known."""
    steps, drawn = len(schedule), len(schedule) * config.data.batch_size
    passes = {each["client"]: drawn / each["train"] for each in summaries}
    sequences = config.cluster.clients * drawn
    if not summaries:
        return Length(schedule.rounds, steps, sequences, passes, None, None)
    tokens = sum(round(passes[each["client"]] * each["train_tokens"]) for each in summaries)
    epochs = sequences / sum(each["train"] for each in summaries)
    return Length(schedule.rounds, steps, sequences, passes, tokens, epochs)


def tell_length(config: Config, schedule: Schedule, summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return lines for the user: the run's length in epochs, sequences and tokens, and a warning where a client goes
    over its data very often. summaries: `ClientData.summary` of every client."""
    length = length_of(config, schedule, summaries)
    passes, epochs = length.passes, length.epochs
    assert epochs is not None
    asked = ""
    if config.algorithm.epochs is not None:
        asked = f" (algorithm.epochs={config.algorithm.epochs:g}, in whole rounds of {epochs / schedule.rounds:.3g})"
    long = "1 epoch" if _times(epochs) == "1" else f"{_times(epochs)} epochs"
    line = f"length: {long}{asked}, {length.sequences:,} sequences, about {length.tokens:,} tokens"
    fewest, most = min(passes.values()), max(passes.values())
    if len(passes) > 1:
        few, many = _times(fewest), _times(most)
        often = many if few == many else f"{few} to {many}"
        line += f" of all clients; a client goes over its data {often} times"
    lines = [line]
    if most > MANY_TIMES:
        client = max(passes, key=passes.__getitem__)
        held = next(each["train"] for each in summaries if each["client"] == client)
        lines.append(
            f"WARNING: client {client} goes over its {held} training sequences {_times(most)} times and will know them "
            f"by heart. {_shorter(schedule, most)}"
        )
    least = min(summaries, key=lambda each: int(each["train"]))
    if (batch := config.data.batch_size) > least["train"]:
        lines.append(
            f"WARNING: data.batch_size = {batch} is more than the {least['train']} training sequences of client "
            f"{least['client']}: each of its batches has every sequence about {_times(batch / least['train'])} times. "
            "Lower data.batch_size"
        )
    return lines


def _times(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _shorter(schedule: Schedule, passes: float) -> str:
    if schedule.rounds > 1 and passes / schedule.rounds <= MANY_TIMES:
        return "Lower algorithm.rounds, or set algorithm.epochs instead"
    return f"One round is {_times(passes / schedule.rounds)} times: lower algorithm.inner_steps, or data.batch_size"


def check_place(schedule: Schedule, saved: Mapping[str, int]) -> None:
    """Raise a UserError unless a run with this schedule comes to the state that was saved, maybe by one of another
    length. saved: see `position`."""
    done = saved["done"]
    if done > len(schedule):
        raise too_short(done, len(schedule), "inner steps")
    here = position(schedule, done)
    if saved["of"] % (schedule.blocks * schedule.inner_steps) == 0 and _same_place(saved, here):
        return
    if schedule.blocks == 1 and saved["of"] != len(schedule):
        raise one_block()
    raise CheckpointError(
        f"the checkpoint stands at {dict(saved)}, where this run has {here}",
        where="run.resume",
        fix="resume with the model that the run was started with",
    )


def _same_place(one: Mapping[str, int], other: Mapping[str, int]) -> bool:
    """Return whether both are one place of the schedule. At a run's end no block is open, as before an activation."""
    if "inner" in one and "inner" in other:
        return all(one[key] == other[key] for key in ("done", "round", "block", "inner"))
    return one["done"] == other["done"] and not one.get("inner") and not other.get("inner")


def too_short(done: int, wanted: int, unit: str) -> ConfigError:
    """Make the error for a run that has done more than is wanted."""
    return ConfigError(
        f"the run has done {done} {unit}, more than the {wanted} that it is to have",
        where="algorithm.rounds, algorithm.epochs",
        fix="a run that continues may get longer: raise it, or name a new folder in run.output",
    )


def one_block() -> CheckpointError:
    """Explain why a run of a single block, which was active all the time, can get neither longer nor shorter."""
    return CheckpointError(
        "a run of one block cannot get another length at its end: the block stays active, with the method's state, "
        "until that comes",
        where="algorithm.rounds, algorithm.epochs",
        fix="start a new run from the exported model (deca export), in a new folder",
    )


def tell_other_length(config: Config, schedule: Schedule, saved: Mapping[str, int]) -> str:
    """Tell the user that a run continues from `saved` with another length than it had there."""
    what = f"the run is {len(schedule)} inner steps long instead of {saved['of']}"
    if config.optimizer.schedule == "constant":
        return what
    rate, before = (
        step_learning_rate(config.optimizer, saved["done"], steps) for steps in (len(schedule), saved["of"])
    )
    return (
        f"WARNING: {what}, and optimizer.schedule={config.optimizer.schedule} follows the new length from here on: "
        f"step {saved['done'] + 1} has a learning rate of {rate:.3g} instead of {before:.3g}"
    )

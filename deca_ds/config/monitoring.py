"""The keys of what a run scores, saves and logs while it trains; see schema.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Optional

from deca_ds.config.key import at_least, key, more_than, or_null

# OmegaConf reads the annotations at run time: Optional[...] and Literal[...] stay spelt out.
# ruff: noqa: UP045


@dataclass
class EvaluationConfig:
    """When the models are scored, and on how many examples."""

    every: int = key(
        0,
        "Inner steps between evaluations; 0 evaluates only before the first and after the last step.",
        allowed=at_least(0),
    )
    batch_size: int = key(8, "Sequences per rank and forward pass.", allowed=at_least(1))
    max_examples: Optional[int] = key(
        512,
        "Largest number of examples of each evaluation set, chosen with `run.seed`; `null` uses all.",
        allowed=or_null(at_least(1)),
    )
    patience: int = key(
        0,
        "Number of evaluations in a row that find no lower loss than an earlier one, after which the run stops; with 0 "
        "it never does.",
        "checkpoints.md#the-best-checkpoint",
        allowed=at_least(0),
    )
    mean_model: bool = key(
        True, "Also score the mean of all clients' models, for which every client computes a part.", "data.md#privacy"
    )


@dataclass
class CheckpointConfig:
    """When the run saves its state, so that it can be resumed. A job that is told to stop saves it in any case."""

    every: int = key(
        0,
        "Inner steps between checkpoints; 0 saves one only when the job is told to stop.",
        "checkpoints.md",
        allowed=at_least(0),
    )
    keep: int = key(2, "Number of complete checkpoints that stay on the disk, the newest ones.", allowed=at_least(1))
    best: bool = key(
        False,
        "Save a checkpoint at every evaluation that finds the lowest loss so far, and keep the last of these.",
        "checkpoints.md#the-best-checkpoint",
    )


@dataclass
class LoggingConfig:
    """What the run logs beside the JSON Lines in `metrics/`, which it always writes."""

    every: int = key(1, "Inner steps between two lines of the metrics.", allowed=at_least(1))
    tensorboard: bool = key(False, "Also write TensorBoard event files, which needs the extra `tensorboard`.")
    tracker: Literal["none", "wandb", "trackio"] = key(
        "none", "Where the same numbers go, too: Weights & Biases or trackio, an extra each.", "output.md#trackers"
    )
    project: str = key("deca_ds", "Name of the project there.")
    progress: bool = key(
        True, "Show on rank 0's stderr how far the run is: a bar on a terminal, else lines.", "output.md#while-it-runs"
    )
    progress_s: float = key(30.0, "Seconds between two such lines.", allowed=more_than(0))

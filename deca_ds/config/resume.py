"""The output folder: whether it is free, and whether a configuration continues the run in it, or contradicts it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from deca_ds.config.flat import flat
from deca_ds.config.load import load_config, save_config
from deca_ds.config.paths import check_writable
from deca_ds.config.schema import Config
from deca_ds.errors import DIVERGED, CheckpointError, ConfigError
from deca_ds.run_folder import (
    CHECKPOINTS,
    CLIENT_FAILED,
    DONE,
    FAILED,
    HEARTBEATS,
    MODEL,
    SAVED_CONFIG,
    STARTS,
    STOP,
    STOPPED,
    is_lock,
    numbered,
)

# What changes how long the run is, or no more than the rounding of what is trained. The number of ranks launched is no
# key and may change, too.
MAY_CHANGE = (
    "run.output",
    "run.resume",
    "run.device",
    "run.threads",
    "cluster.ranks",
    "cluster.transport",
    "cluster.timeout_s",
    "cluster.allow_mixed_versions",
    "cluster.on_failure",
    "cluster.absent",
    "cluster.min_clients",
    "cluster.on_partition",
    "cluster.return_s",
    "model.gradient_checkpointing",
    "algorithm.rounds",
    "algorithm.epochs",
    "gossip.wait_s",
    "gossip.checksums",
    "gossip.chunk_mib",
    "data.cache",
    "data.micro_batch_size",
    "evaluation.",
    "checkpoint.",
    "logging.",
    "deepspeed",
)
AFTER_DIVERGENCE = ("optimizer.",)  # what may change, too, where the run has ended because it had diverged
# what may be there of a run that ended before it had saved its configuration
BEFORE_CONFIG = {HEARTBEATS, FAILED, STOPPED, STOP}
_TRAINED = (STARTS, CHECKPOINTS, MODEL, DONE)  # one of these is there of a run that has come to train


def check_folder(config: Config) -> None:
    """Raise a UserError unless run.output is what run.resume wants: a new folder, or that of a run to be continued.

    With run.resume=auto an empty folder will do, and one whose run has not come to its first checkpoint; if it has not
    even come to train, there is nothing that the configuration could contradict. A run that has finished can be
    continued, too.
    """
    output = Path(config.run.output)
    saved = output / SAVED_CONFIG
    if config.run.resume == "never":
        check_output(config)
        return
    check_writable(output, "run.output")
    there = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if config.run.resume == "auto" and all(name in BEFORE_CONFIG or is_lock(name) for name in there):
        return
    if not saved.is_file():
        raise CheckpointError(
            f"there is no run to continue in {str(output)!r}: it has no {SAVED_CONFIG}",
            where="run.output",
            fix="name the output folder of the run, or leave run.resume out",
        )
    if config.run.resume == "auto" and not has_begun(output):
        return
    allowed = MAY_CHANGE + (AFTER_DIVERGENCE if has_diverged(output) else ())
    changed = changes(load_config(saved), config, allowed)
    if changed:
        key, (before, now) = next(iter(changed.items()))
        others = f" (and {', '.join(list(changed)[1:])})" if len(changed) > 1 else ""
        raise ConfigError(
            f"{key} = {now!r}{others}, but the run was started with {before!r}",
            where=f"run.resume={config.run.resume}, {saved}",
            fix="resume with the run's own configuration; only these and the number of ranks may change: "
            + ", ".join(name.rstrip(".") for name in allowed),
        )


def check_output(config: Config) -> Path:
    """Return the run's output folder. Raises ConfigError if it cannot be made, or holds more than LOCK and heartbeats,
    which a job writes when it takes the folder, and leaves there if it is refused or killed."""
    output = Path(config.run.output)
    check_writable(output, "run.output")
    if is_used(output):
        raise already_used(output)
    return output


def is_used(output: Path) -> bool:
    """Return whether the folder holds more than LOCK and heartbeats."""
    return output.is_dir() and holds_more(path.name for path in output.iterdir())


def holds_more(names: Iterable[str]) -> bool:
    """Return whether a folder with files of these names holds more than LOCK and heartbeats."""
    return any(name != HEARTBEATS and not is_lock(name) for name in names)


def already_used(output: Path) -> ConfigError:
    """Make the error for an output folder that holds a run already."""
    return ConfigError(
        f"the output folder {str(output)!r} is already used",
        where="run.output",
        fix="name a new folder: a run never writes over another one. To continue that run: run.resume=require",
    )


def check_new(config: Config) -> None:
    """Check the output folder of a run that begins anew, because there was none to be continued when it looked first.
    Raises ConfigError where there is one now."""
    check_folder(config)
    if has_begun(Path(config.run.output)):
        raise ConfigError(
            f"another job has begun a run in {config.run.output!r} meanwhile",
            where="run.output",
            fix="start this one again, to continue that run, or name another folder",
        )


def same_command(resume: str, *, trained: bool) -> str:
    """Say how to continue a run that has stopped. resume: the run.resume that it was started with. trained: whether it
    has saved a checkpoint; without one, the run begins anew."""
    if resume != "never":
        return "the same command"
    return f"the same command with run.resume={'require' if trained else 'auto'}"


def has_begun(output: Path) -> bool:
    """Return whether the run in `output` has come to train. One that ended while it loaded has left its configuration
    there, and maybe its data's table, but nothing to continue from."""
    return (output / SAVED_CONFIG).is_file() and any((output / name).exists() for name in _TRAINED)


def has_diverged(output: Path) -> bool:
    """Return whether the run in `output` has ended at values that were not finite."""
    return any(map(tells_divergence, (output / FAILED, *numbered(output, CLIENT_FAILED).values())))


def tells_divergence(marker: Path) -> bool:
    """Return whether the marker of a failure, if there is one, tells of values that were not finite."""
    with suppress(FileNotFoundError):
        return DIVERGED in marker.read_text(errors="replace")
    return False


def save_changes(config: Config) -> str:
    """Note in the run's folder that it continues with another section optimizer or another length; returns what is new,
    for people."""
    saved = Path(config.run.output) / SAVED_CONFIG
    before, own = load_config(saved), config.algorithm
    algorithm = replace(before.algorithm, rounds=own.rounds, epochs=own.epochs)
    after = replace(before, algorithm=algorithm, optimizer=config.optimizer)
    if after == before:
        return ""
    save_config(after, saved)
    changed = changes(before, after, allowed=()).items()
    return ", ".join(f"{key} = {new!r} instead of {old!r}" for key, (old, new) in changed)


def changes(before: Config, now: Config, allowed: Sequence[str] = MAY_CHANGE) -> dict[str, tuple[Any, Any]]:
    """Return the keys that differ and must not, each with both values. allowed: names of keys, and of sections with a
    dot."""
    old, new = flat(before), flat(now)
    return {
        key: (old[key], value)
        for key, value in new.items()
        if old[key] != value
        and (key, value) != ("data.date", None)  # then the day of the first start counts
        and not any(key == name or (name.endswith(".") and key.startswith(name)) for name in allowed)
    }

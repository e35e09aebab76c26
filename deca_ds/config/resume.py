"""Whether a configuration continues the run in its output folder, or contradicts it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from deca_ds.config.checks import check_output
from deca_ds.config.load import load_config
from deca_ds.config.schema import Config
from deca_ds.errors import CheckpointError, ConfigError

SAVED_CONFIG = "config.yaml"
# What changes no more than the rounding of what is trained. The number of ranks launched is no key and may change, too.
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
    "gossip.wait_s",
    "gossip.checksums",
    "gossip.chunk_mib",
    "data.micro_batch_size",
    "evaluation.",
    "checkpoint.",
    "logging.",
    "deepspeed",
)
BEFORE_CONFIG = {"heartbeats", "FAILED"}  # what may be there of a run that ended before it had saved its configuration


def check_folder(config: Config) -> None:
    """Raise a UserError unless run.output is what run.resume wants: a new folder, or that of a run to be continued.

    With run.resume=auto an empty folder will do, and one whose run has not come to its first checkpoint.
    """
    output = Path(config.run.output)
    saved = output / SAVED_CONFIG
    if config.run.resume == "never":
        check_output(config)
        return
    there = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if config.run.resume == "auto" and not output.is_file() and there <= BEFORE_CONFIG:
        return
    if not saved.is_file():
        raise CheckpointError(
            f"there is no run to continue in {str(output)!r}: it has no {SAVED_CONFIG}",
            where="run.output",
            fix="name the output folder of the run, or leave run.resume out",
        )
    if (output / "DONE").exists():
        raise CheckpointError("the run has finished", where=str(output), fix="name a new folder in run.output")
    changed = changes(load_config(saved), config)
    if changed:
        key, (before, now) = next(iter(changed.items()))
        others = f" (and {', '.join(list(changed)[1:])})" if len(changed) > 1 else ""
        raise ConfigError(
            f"{key} = {now!r}{others}, but the run was started with {before!r}",
            where=f"run.resume={config.run.resume}, {saved}",
            fix="resume with the run's own configuration; only these and the number of ranks may change: "
            + ", ".join(name.rstrip(".") for name in MAY_CHANGE),
        )


def changes(before: Config, now: Config) -> dict[str, tuple[Any, Any]]:
    """Key -> both values, of the keys that differ and must not."""
    old, new = flat(before), flat(now)
    return {
        key: (old[key], value)
        for key, value in new.items()
        if old[key] != value
        and (key, value) != ("data.date", None)  # then the day of the first start counts
        and not any(key == name or (name.endswith(".") and key.startswith(name)) for name in MAY_CHANGE)
    }


def flat(config: Config) -> dict[str, Any]:
    """section.key -> value, of all keys."""
    sections = asdict(config)
    flat = {}
    for section, values in sections.items():
        flat |= (
            {f"{section}.{key}": value for key, value in values.items()}
            if isinstance(values, dict)
            else {section: values}
        )
    return flat

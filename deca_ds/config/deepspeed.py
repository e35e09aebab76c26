"""The user's DeepSpeed configuration: reading it, and which keys it may not have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deca_ds.config.paths import read_given
from deca_ds.errors import ConfigError

# DeepSpeed keys that the trainer sets itself or that would break block-wise training, with the reason.
REFUSED_DEEPSPEED_KEYS = {
    "optimizer": "the block optimizer replaces it; set optimizer.* in the run's YAML",
    "scheduler": "set optimizer.schedule in the run's YAML",
    "fp16": "float16 is not supported; use model.dtype=bfloat16",
    "bf16": "it follows model.dtype",
    "gradient_clipping": "set optimizer.clip_norm in the run's YAML",
    "gradient_accumulation_steps": "it follows data.batch_size and data.micro_batch_size",
    "train_batch_size": "set data.batch_size in the run's YAML",
    "train_micro_batch_size_per_gpu": "set data.micro_batch_size in the run's YAML",
    "zero_optimization.offload_optimizer": "only the active block has optimizer state",
    "zero_optimization.zero_hpz_partition_size": "its secondary copies go stale when shards are written",
    "zero_optimization.zero_quantized_weights": "its quantised copies go stale when shards are written",
    "zero_optimization.zero_quantized_nontrainable_weights": "its quantised copies go stale when shards are written",
    "zero_optimization.stage3_allgather_sequential": "what it gathers for one rank are copies, which training misses",
    "zero_optimization.mics_shard_size": "every client is one ZeRO-3 world",
    "zero_optimization.stage3_param_persistence_threshold": "it must be 0, and is: kept parameters would go stale",
    "zero_optimization.stage3_model_persistence_threshold": "it must be 0, and is: kept parameters would go stale",
}


def read_deepspeed_json(path: Path) -> dict[str, Any]:
    """Return the user's DeepSpeed configuration. Raises ConfigError for a file that is no JSON object, for a ZeRO stage
    other than 3 and for keys that the trainer owns or cannot support."""
    text = read_given(path, "the DeepSpeed configuration", ConfigError, where="deepspeed")
    try:
        read = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"not valid JSON: {error.msg}", where=f"{path}, line {error.lineno}", fix="repair it there"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise ConfigError(
            f"cannot be read: {error}", where=str(path), fix="write JSON that other programs read"
        ) from error
    if not isinstance(read, dict) or not isinstance(read.get("zero_optimization", {}), dict):
        raise ConfigError(
            "a DeepSpeed configuration is a JSON object, and so is its zero_optimization",
            where=str(path),
            fix="write {...}, like ds_configs/zero3.json",
        )
    zero = read.get("zero_optimization", {})
    if zero.get("stage", 3) != 3:
        raise ConfigError(f"zero_optimization.stage = {zero['stage']}", where=str(path), fix="every client is ZeRO-3")
    for key, reason in REFUSED_DEEPSPEED_KEYS.items():
        section, _, name = key.rpartition(".")
        if name in (read.get(section, {}) if section else read):
            raise ConfigError(f"{key} cannot be set here", where=str(path), fix=f"take it out: {reason}")
    offload = zero.get("offload_param") or {}
    if not isinstance(offload, dict):
        raise ConfigError(
            f"zero_optimization.offload_param = {offload!r} is no JSON object",
            where=str(path),
            fix='write {"device": "cpu"}',
        )
    if offload.get("device", "none") not in ("none", "cpu"):
        raise ConfigError(
            f"zero_optimization.offload_param.device = {offload['device']!r}",
            where=str(path),
            fix="parameters can be offloaded to cpu; shards that lie on NVMe cannot be mixed with the neighbours'",
        )
    return read

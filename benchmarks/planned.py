"""What the plan says that `one_client`'s client holds in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import LlamaConfig

from deca_ds.config import load_config
from deca_ds.config.schema import GossipConfig
from deca_ds.gossip.schedule import build_mixing
from deca_ds.planning.estimate import BlockMemory, Estimate
from deca_ds.planning.memory import KEPT, PASSES, PROCESS, totals


def estimate_of(shape: dict[str, Any], length: int, ranks: int, overrides: Sequence[str]) -> Estimate:
    """Make the plan of `one_client`'s client, with one sequence of `length` tokens a rank."""
    keys = ["model.path=none", "run.output=none", "cluster.clients=1", "blocks.layers_per_block=1"]
    config = load_config(None, [*keys, f"data.max_length={length}", "data.micro_batch_size=1", *overrides])
    return Estimate(config, LlamaConfig(**shape), build_mixing(GossipConfig(), 1, 0), ranks, gpu=False)


def at_rest(block: BlockMemory) -> int:
    """Return the bytes above those of the process, before the block's first step."""
    return totals(block.parts, "host")["rest"] - kept_in(block) - PROCESS


def in_step(block: BlockMemory) -> int:
    """Return the bytes above those of the process, at the fullest moment of a step."""
    at = totals(block.parts, "host")
    return max(at[moment] for moment in ("rest", *PASSES, "reduction")) - PROCESS


def kept_in(block: BlockMemory) -> int:
    """Return the bytes that the C library keeps after the passes."""
    return sum(part.bytes for part in block.parts if part.name == KEPT)

"""The resident memory of this process (Linux), and what the plan says that it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from deca_ds.config import load_config
from deca_ds.config.schema import GossipConfig
from deca_ds.gossip.schedule import build_mixing
from deca_ds.planning.estimate import BlockMemory, Estimate
from deca_ds.planning.memory import PASSES, PROCESS, totals


def resident(name: str = "VmRSS") -> int:
    """Bytes; VmHWM: the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def peak_of(action: Callable[[], object]) -> int:
    """Peak resident memory during the action, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    action()
    return resident("VmHWM")


def estimate_of(shape: dict[str, Any], length: int, ranks: int, overrides: Sequence[str]) -> Estimate:
    """The plan of `one_client`'s client, with one sequence of `length` tokens a rank."""
    keys = ["model.path=none", "run.output=none", "cluster.clients=1", "blocks.layers_per_block=1"]
    config = load_config(None, [*keys, f"data.max_length={length}", "data.micro_batch_size=1", *overrides])
    return Estimate(config, LlamaConfig(**shape), build_mixing(GossipConfig(), 1, 0), ranks, gpu=False)


def at_rest(block: BlockMemory) -> int:
    """Bytes above those of the process, between steps."""
    return totals(block.parts, "host")["rest"] - PROCESS


def in_step(block: BlockMemory) -> int:
    """Bytes above those of the process, at the fullest moment of a step."""
    at = totals(block.parts, "host")
    return max(at[moment] for moment in ("rest", *PASSES, "reduction")) - PROCESS

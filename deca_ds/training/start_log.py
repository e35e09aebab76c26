"""The starts of a run: when, with which method, for how long and on what; starts.json in its folder, an entry each."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import deca_ds
from deca_ds.algorithm import METHODS, BlockPlan
from deca_ds.config import Config
from deca_ds.gossip import MixingSchedule
from deca_ds.launch.compare_ranks import software
from deca_ds.run_folder import STARTS
from deca_ds.training.chosen_method import in_words


def record_start(
    config: Config,
    mixing: MixingSchedule,
    *,
    done: int,
    rounds: int,
    architecture: str,
    parameters: int,
    plan: BlockPlan,
    ranks: Sequence[int] = (),
    transport: str = "",
    device: torch.device | None = None,
) -> None:
    """Add the entry of a start that continues after `done` inner steps of `rounds` rounds, or of a simulation.

    architecture, parameters: the model's class, and how many it has. ranks: of each client. A file that cannot be read
    is written anew.
    """
    path = Path(config.run.output) / STARTS
    on_gpu = device is not None and device.type == "cuda"
    entry = {
        "step": done,
        "rounds": rounds,
        "epochs": config.algorithm.epochs,
        "method": in_words(config),
        "papers": METHODS[config.algorithm.method].papers,
        "time": round(time.time(), 3),
        "ranks": list(ranks),
        "transport": transport,
        "device": torch.cuda.get_device_name(device) if on_gpu else "CPU",
        "software": {
            "deca_ds": deca_ds.__version__,
            **software(config, [matrix.tobytes() for matrix in mixing.matrices]),
        },
        "model": {
            "architecture": architecture,
            "parameters": parameters,
            "blocks": [[block.label, block.numel] for block in plan.blocks],
        },
    }
    partial = path.with_name(f".{STARTS}.partial")
    partial.write_text(json.dumps([*read_starts(path.parent), entry], indent=1) + "\n")
    os.replace(partial, path)


def read_starts(run: Path) -> list[dict[str, Any]]:
    """Return the entries, in order; none if the file cannot be read."""
    try:
        found = json.loads((run / STARTS).read_text())
    except (FileNotFoundError, ValueError):
        return []
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []

"""When a run was started, and what it ran on: starts.json in its folder, an entry a start, for people."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

import deca_ds
from deca_ds.engine.client import Client
from deca_ds.launch import Cluster

FILE = "starts.json"


def record_start(output: Path, client: Client, cluster: Cluster, done: int, software: Mapping[str, str]) -> None:
    """Add the entry of this start, which goes on after `done` inner steps. software: see launch/compare.py.

    A file that cannot be read is written anew: nothing depends on it.
    """
    layout = cluster.layout
    entry = {
        "step": done,
        "time": round(time.time(), 3),
        "ranks": [len(layout.ranks_of(client)) for client in range(cluster.clients)],
        "transport": cluster.transport,
        "device": torch.cuda.get_device_name(cluster.device) if cluster.device.type == "cuda" else "CPU",
        "software": {"deca_ds": deca_ds.__version__, **software},
        "model": {
            "architecture": type(client.model).__name__,
            "parameters": sum(map(prod, client.shapes.values())),
            "blocks": [[block.label, block.numel] for block in client.plan.blocks],
        },
    }
    partial = output / f".{FILE}.partial"
    partial.write_text(json.dumps([*_earlier(output / FILE), entry], indent=1) + "\n")
    os.replace(partial, output / FILE)


def _earlier(path: Path) -> list[Any]:
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return []
    return found if isinstance(found, list) else []

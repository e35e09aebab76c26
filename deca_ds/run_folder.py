"""The names of what lies in a run's output folder; docs/output.md says what each holds."""

from __future__ import annotations

import re
from pathlib import Path

# files. LOCK: which job has the folder. SAVED_CONFIG: the resolved configuration. STARTS: when the run was started.
# DATA: what each client trains on. EDGES: how fast the graph's edges are. COORDINATORS: where a client asks to rejoin.
# SIMULATION: the metrics of a simulation. ADAPTERS: which weights have adapters. STOP: the request to stop.
LOCK, SAVED_CONFIG, STARTS, DATA, EDGES = "LOCK", "config.yaml", "starts.json", "data.json", "edges.json"
COORDINATORS, SIMULATION, ADAPTERS, STOP = "coordinators.json", "simulation.jsonl", "adapters.json", "STOP"
# markers of how the run has ended
DONE, STOPPED, FAILED = "DONE", "STOPPED", "FAILED"
# folders. MODEL: the trained model, in shards. BASE: the model's configuration and the tokenizer.
MODEL, BASE, CHECKPOINTS, METRICS, HEARTBEATS = "model", "hf", "checkpoints", "metrics", "heartbeats"
# names with a number in them, for `format` and `numbered`. CLIENT, RANK: folders of a saved model, one in the other.
# STEP: of a checkpoint. CLIENT_FAILED: the marker of a client that has failed by itself. CLIENT_METRICS: in METRICS.
# BEAT, JOINED: in HEARTBEATS; what a rank does, and that it has joined the job by itself.
CLIENT, RANK, STEP = "client_{:03d}", "rank_{:03d}", "step_{:08d}"
CLIENT_FAILED, CLIENT_METRICS = f"{FAILED}_{CLIENT}", f"{CLIENT}.jsonl"
BEAT, JOINED = "rank_{:04d}.json", "rank_{:04d}.joined"


def numbered(folder: Path, name: str) -> dict[int, Path]:
    """Return what is in `folder` under a name with a number, such as CLIENT: the paths by their numbers, ascending.
    What has been put beside them under other names, such as client_003.bak, is left out."""
    before, after = re.split(r"\{.*\}", name)
    found = {}
    for path in folder.glob(f"{before}*{after}"):
        number = path.name[len(before) : len(path.name) - len(after)]
        if number.isdecimal() and name.format(int(number)) == path.name:
            found[int(number)] = path
    return dict(sorted(found.items()))


def client_metrics(run: Path, client: int) -> Path:
    """Return the file with the metrics of a client."""
    return run / METRICS / CLIENT_METRICS.format(client)


def job_metrics(run: Path) -> Path:
    """Return the file with the metrics of all clients together."""
    return run / METRICS / "job.jsonl"


def is_lock(name: str) -> bool:
    """Return whether a file of this name is LOCK, or one that is there while a job takes the folder over."""
    return name == LOCK or name.startswith(f"{LOCK}_")

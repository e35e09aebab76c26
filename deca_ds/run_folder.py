"""The names of what lies in a run's output folder; docs/output.md says what each holds."""

from __future__ import annotations

from pathlib import Path

# files. LOCK: which job has the folder. SAVED_CONFIG: the resolved configuration. STARTS: when the run was started.
# DATA: what each client trains on. EDGES: how fast the graph's edges are. COORDINATORS: where a client asks to rejoin.
# SIMULATION: the metrics of a simulation.
LOCK, SAVED_CONFIG, STARTS, DATA, EDGES = "LOCK", "config.yaml", "starts.json", "data.json", "edges.json"
COORDINATORS, SIMULATION = "coordinators.json", "simulation.jsonl"
# markers of how the run has ended
DONE, STOPPED, FAILED = "DONE", "STOPPED", "FAILED"
# folders. MODEL: the trained model, in shards. BASE: the model's configuration and the tokenizer.
MODEL, BASE, CHECKPOINTS, METRICS, HEARTBEATS = "model", "hf", "checkpoints", "metrics", "heartbeats"


def client_metrics(run: Path, client: int) -> Path:
    """Return the file with the metrics of a client."""
    return run / METRICS / f"client_{client:03d}.jsonl"


def job_metrics(run: Path) -> Path:
    """Return the file with the metrics of all clients together."""
    return run / METRICS / "job.jsonl"


def client_failure(client: int) -> str:
    """Return the name of the marker of a client that has failed by itself."""
    return f"{FAILED}_client_{client:03d}"


def is_lock(name: str) -> bool:
    """Return whether a file of this name is LOCK, or one that is there while a job takes the folder over."""
    return name == LOCK or name.startswith(f"{LOCK}_")

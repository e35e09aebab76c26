"""Folders as runs and simulations leave them, with scores that can be told apart, for the tests of `deca report`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

LABELS = ("login", "refund")


def score(client: int, step: int) -> float:
    return round(2.0 + client / 8 - step / 64, 6)


def scores(loss: float, labels: Sequence[str] = LABELS) -> dict[str, Any]:
    first, second = labels
    return {
        "loss": loss, "perplexity": 2.718**loss, "examples": 8, "accuracy": 0.875, "macro_f1": 0.8125,
        "recall": {first: 1.0, second: 0.75},
        "confusion": [[first, first, 4], [second, first, 1], [second, second, 3]],
    }  # fmt: skip


def config(clients: int, **keys: Any) -> dict[str, Any]:
    """Nested, as in config.yaml. keys: section__key=value."""
    made: dict[str, Any] = {
        "run": {"output": "runs/x", "seed": 0},
        "cluster": {"clients": clients},
        "model": {"path": "some/model"},
        "algorithm": {"method": "deca", "signal": "descent", "rounds": 2, "inner_steps": 4},
        "optimizer": {"lr": 0.001, "schedule": "cosine"},
        "gossip": {"graph": "ring", "weights": "metropolis", "matrix": None, "edges": None, "edge_probability": 0.5},
        "data": {"train": ["a.jsonl"], "format": "classification", "batch_size": 4},
        "logging": {"every": 1},
    }
    for name, value in keys.items():
        section, _, key = name.partition("__")
        made.setdefault(section, {})[key] = value
    return made


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_job(folder: Path, clients: int = 3, steps: int = 16, labels: Sequence[str] = LABELS, **keys: Any) -> Path:
    """Of a job of two blocks that is through; evaluations every 8 steps."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config(clients, **keys)))
    for client in range(clients):
        lines: list[dict[str, Any]] = []
        for step in range(steps + 1):
            if step:
                place = {"round": (step - 1) // 8, "block": f"layers {(step - 1) // 4 % 2}", "inner": (step - 1) % 4}
                numbers = {"lr": 0.001 / step, "loss": score(client, step), "norm": 0.5, "seconds": 0.25, "tokens": 100}
                lines.append({"kind": "step", "step": step, **place, **numbers, "gossip_wait_seconds": 0.0625})
            if step % 8 == 0:
                sent = {"gossip_bytes_sent": 1_000_000 * step, "seconds": 0.5}
                memory = {
                    "peak_memory_bytes_by_rank_before": [2**30],
                    "peak_memory_bytes_by_rank": [2**30 + step * 2**24],
                }
                own = scores(score(client, step), labels)
                lines.append({"kind": "evaluation", "step": step, "common": own, **sent, **memory})
        write_lines(folder / f"metrics/client_{client:03d}.jsonl", lines)
    together = [
        {"kind": "evaluation", "step": step, "mean": scores(1.5 - step / 32, labels), "consensus_distance": step / 128}
        for step in range(0, steps + 1, 8)
    ]
    write_lines(folder / "metrics/job.jsonl", together)
    shares = [
        {"client": client, "train": 50 + client, "examples": 50, "own_evaluation": 0, "common_evaluation": 8,
         "train_tokens": 900, "target_tokens": 100, "labels": {labels[0]: 7 + client, labels[1]: 43 - client}}
        for client in range(clients)
    ]  # fmt: skip
    (folder / "data.json").write_text(json.dumps(shares))
    edge = {"clients": [0, 1], "hosts": ["n1", "n2"], "shards": [{"round_trip_ms": 0.75, "mb_per_s": 512.0}]}
    (folder / "edges.json").write_text(json.dumps([edge] if clients > 1 else []))
    start = {"step": 0, "time": 1.75e9, "ranks": [1] * clients, "device": "CPU", "transport": "torch"}
    start |= {"method": "DECA (signal: descent)", "papers": ["2606.03209"]}
    model = {"architecture": "LlamaForCausalLM", "parameters": 242240, "blocks": [["layers 0", 9], ["layers 1", 9]]}
    (folder / "starts.json").write_text(json.dumps([{**start, "software": {"torch": "2.13.0"}, "model": model}]))
    (folder / "DONE").write_text(f"inner steps: {steps} of {steps}\n")
    return folder


def write_simulation(folder: Path, clients: int = 3, **keys: Any) -> Path:
    """Of `deca simulate`: all clients in each line, and no evaluation of labels."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config(clients, **keys)))
    lines: list[dict[str, Any]] = []
    for step in range(9):
        if step:
            losses, sent = [score(client, step) for client in range(clients)], [4000 * step] * clients
            place = {"round": 0, "block": "layers 0-1", "inner": step - 1, "gossip": True, "lr": 0.001}
            lines.append({"kind": "step", "step": step, **place, "loss": losses, "bytes_sent": sent})
        if step % 4 == 0:
            each = [{"own": {"loss": score(client, step), "examples": 3}} for client in range(clients)]
            mean = {"mean": {"loss": 1.25 - step / 32, "examples": 9}, "consensus_distance": step / 64}
            lines.append({"kind": "evaluation", "step": step, "clients": each, **mean})
    write_lines(folder / "simulation.jsonl", lines)
    (folder / "data.json").write_text("[]")
    return folder

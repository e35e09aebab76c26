"""A short job of two clients on labelled data, which tests of launching and of failing change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture
def rows(tmp_path) -> Path:
    """A labelled data set of three words, each of which decides the label."""
    lines = []
    for i in range(90):
        colour = ("red", "green", "blue")[i % 3]
        lines.append(json.dumps({"text": f"w{i % 3} w{i % 7} w{(i * 5) % 11} w{i % 3}", "label": colour}))
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def config(tiny_model, rows, tmp_path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"""
run: {{output: {tmp_path / "run"}, device: cpu, threads: 1}}
cluster: {{clients: 2, timeout_s: 60}}
model: {{path: {tiny_model}}}
blocks: {{layers_per_block: 2}}
algorithm: {{rounds: 1, inner_steps: 3}}
optimizer: {{lr: 0.003, schedule: cosine, warmup_steps: 2}}
data:
  train: [{rows}]
  format: classification
  partition: dirichlet
  alpha: 0.5
  common_holdout: 0.2
  max_length: 24
  batch_size: 8
  micro_batch_size: 2
evaluation: {{every: 6}}
"""
    )
    return path

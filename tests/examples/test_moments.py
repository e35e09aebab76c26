"""What examples/ablation/moments.py shows of a run is so, and looking at it changes nothing."""

from __future__ import annotations

import sys

import pytest
import torch
from jobs import REPOSITORY

from deca_ds.config import load_config
from deca_ds.simulation.setup import build


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples/ablation"))
    yield
    for name in ("ablation", "moments"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("changes", [{}, {"algorithm.signal": "fade"}, {"algorithm.method": "gossip-adam"}], ids=str)
def test_a_run_that_is_watched_trains_as_one_that_is_not(tiny_model, word_files, changes):
    from moments import COLUMNS, table, watched

    keys = {
        "model.path": tiny_model,
        "cluster.clients": 3,
        "gossip.graph": "ring",
        "data.train": f"[{','.join(map(str, word_files))}]",
        "data.max_length": 16,
        "data.batch_size": 2,
        "data.micro_batch_size": 2,
        "algorithm.rounds": 1,
        "algorithm.inner_steps": 3,
        "optimizer.lr": 0.003,
        "evaluation.max_examples": 2,
        **changes,
    }
    make = lambda: build(load_config(None, [f"{key}={value}" for key, value in keys.items()]))  # noqa: E731
    plain, looked_at = make(), make()
    for _ in plain.run(evaluate_first=False):
        pass
    found = watched(looked_at)
    assert torch.equal(plain.clients.values, looked_at.clients.values) and plain.steps == looked_at.steps
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in found]
    assert len(rows) == 3, "one for each inner step"
    assert 0.5 < rows[0]["step"] <= 1.001, "Adam's first step is of one length for every element"
    assert (rows[0]["|h| / |g|"] > 0) == (rows[0]["h in v"] > 0) == (changes != {"algorithm.signal": "fade"})
    assert rows[0]["m along g"] > 0
    assert table({"this": found}).count("\n| this |") == 3

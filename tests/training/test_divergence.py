"""The first value that is not finite ends a run, and the message says which, whose, when, and what is left."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from deca_ds.algorithm.schedule import Schedule
from deca_ds.engine.client import GradientStats
from deca_ds.errors import DIVERGED, DivergedError, DivergedMessageError, GossipError
from deca_ds.launch.launcher import ClientLayout
from deca_ds.training import divergence
from deca_ds.training.divergence import Watch, with_checkpoint
from deca_ds.training.evaluation import summarize


@pytest.fixture
def watch(monkeypatch) -> Watch:
    """Rank 1 of client 1's two, as rank 3 of the job; its blocks are a and b."""
    blocks = [SimpleNamespace(label=label) for label in "ab"]
    client = SimpleNamespace(plan=SimpleNamespace(blocks=blocks), device="cpu")
    distributed = SimpleNamespace(get_world_size=lambda: 2, get_rank=lambda: 1, all_reduce=lambda tensor: None)
    monkeypatch.setattr(divergence, "dist", distributed)
    return Watch(client, SimpleNamespace(client=1, layout=ClientLayout(2, 2)), ("m", "v"))


def stats(loss: float = 1.0, norm: float = 1.0, kept: tuple[float, ...] = (1.0, 0.0, 1.0)) -> GradientStats:
    return GradientStats(loss, 4, 8, norm, list(kept), torch.tensor([loss, norm**2, *kept]))


BAD = [math.nan, math.inf, -math.inf]
STEPS = list(Schedule(rounds=1, blocks=2, inner_steps=1))


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    ("values", "told", "place"),
    [
        (lambda bad: {"loss": bad}, "the loss is not finite", "inner step 2, block b"),
        (lambda bad: {"norm": bad}, "the norm of the gradient is not finite", "inner step 2, block b"),
        (lambda bad: {"kept": (bad, 0.0, 0.0), "loss": bad}, "norm of the block's parameters", "inner step 1, block a"),
        (lambda bad: {"kept": (1.0, 0.0, bad)}, "the optimizer's state 'v' is not finite", "inner step 1, block a"),
    ],
)
def test_each_kind_is_named_with_step_block_client_and_rank(watch, bad, values, told, place) -> None:
    watch.gradient(STEPS[0], stats(kept=()))
    with pytest.raises(DivergedError) as caught:
        watch.gradient(STEPS[1], stats(**values(bad)))
    assert caught.value.what.startswith("client 1 has diverged: ") and told in caught.value.what
    assert caught.value.where == f"client 1, {place}, rank 3"


def test_the_marker_of_a_run_that_ends_so_tells_it() -> None:
    assert DIVERGED in str(divergence.diverged("client 3", "the loss is nan", "inner step 1"))


def test_what_is_left_to_continue_from_is_named() -> None:
    error = DivergedMessageError("client 1 has diverged", where="client 1", fix="lower it")
    told = with_checkpoint(error, Path("run/checkpoints"), 40)
    assert isinstance(told, GossipError) and "run/checkpoints/step_00000040 is finite" in str(told)
    assert "run.resume=require continues after inner step 40" in str(told)
    assert "no checkpoint had been saved" in str(with_checkpoint(error, Path("run/checkpoints"), None))


@pytest.mark.parametrize("bad", BAD)
def test_a_score_that_is_not_finite_never_chooses_a_label(bad: float) -> None:
    """The row of the wrong answer: loss and label would pass for scores."""
    data = SimpleNamespace(label_names=["red", "blue"], answers=True)
    rows = {"example": [0, 0], "candidate": [0, 1], "label": [0, 0]}
    totals = torch.tensor([[1.0, 0, 1], [bad, 0, 1]], dtype=torch.float64)
    with pytest.raises(DivergedError, match="client 3 has diverged: the loss of 1 of 2 rows"):
        summarize(totals, Dataset.from_dict(rows), data, "client 3")
    with pytest.raises(DivergedError, match="the model has diverged"):
        summarize(totals, Dataset.from_dict({"labels": [[1], [2]]}), data)

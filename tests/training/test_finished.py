"""A run that has begun, and what its configuration then asks for: nothing, to continue, or another length."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from deca_ds.config import Config, load_config, save_config
from deca_ds.engine.state import position
from deca_ds.errors import CheckpointError, ConfigError, UserError
from deca_ds.training.chosen_method import build_schedule
from deca_ds.training.length import check_place, tell_other_length
from deca_ds.training.resume import look_at_output

STEPS = 2 * 4 * 5  # rounds, blocks, inner steps


def config(run: Path, *keys: str) -> Config:
    fixed = ["model.path=x", "cluster.clients=2", "algorithm.inner_steps=5", "data.batch_size=2"]
    return load_config(None, [*fixed, f"run.output={run}", "run.resume=auto", "data.micro_batch_size=1", *keys])


def make_run(run: Path, *, done: bool = True, blocks: int = 4, state: bool = True, epochs: float | None = None) -> Path:
    """Of two rounds."""
    save_config(config(run), run / "config.yaml")
    start = {"rounds": 2, "epochs": epochs, "model": {"blocks": [[str(block), 1] for block in range(blocks)]}}
    (run / "starts.json").write_text(json.dumps([start]))
    (run / "data.json").write_text(json.dumps([{"client": 0, "train": 10}, {"client": 1, "train": 30}]))
    if done:
        (run / "DONE").write_text(f"inner steps: {2 * blocks * 5} of {2 * blocks * 5}\n")
    part = run / "model/client_000/rank_000"
    part.mkdir(parents=True)
    (part / "manifest.json").write_text(json.dumps({"state": {"attempt": 1} if state else {}}))
    return run


def looked_at(rounds: int, *, finished: bool = True, ends: bool = False, blocks: int | None = 4) -> dict:
    return {"rounds": rounds, "blocks": blocks, "finished": finished, "ends": ends}


def test_a_finished_run_ends_or_gets_longer(tmp_path):
    run = make_run(tmp_path)
    assert look_at_output(config(run, "algorithm.rounds=2")) == looked_at(2, ends=True)
    assert look_at_output(config(run, "algorithm.rounds=3")) == looked_at(3)
    (run / "DONE").unlink()
    assert look_at_output(config(run, "algorithm.rounds=3")) == looked_at(3, finished=False)
    (run / "starts.json").write_text("torn")
    assert look_at_output(config(run, "algorithm.rounds=3")) == looked_at(3, finished=False, blocks=None)


def test_lengths_are_compared_by_what_they_come_to(tmp_path):
    run = make_run(tmp_path)
    a_round = 2 * 2 * 4 * 5 / 40  # epochs
    assert look_at_output(config(run, f"algorithm.epochs={2 * a_round}"))["ends"]
    assert look_at_output(config(run, f"algorithm.epochs={2 * a_round + 0.1}")) == looked_at(3)


def test_epochs_are_as_many_rounds_as_when_the_run_started_with_them(tmp_path):
    """Another client may have come since, and its data with it."""
    run = make_run(tmp_path, epochs=3.5)
    assert look_at_output(config(run, "algorithm.epochs=3.5"))["ends"]
    longer = {"rounds": 5, "epochs": 9.0, "model": {"blocks": [["0", 1]] * 4}}
    (run / "starts.json").write_text(json.dumps([*json.loads((run / "starts.json").read_text()), longer]))
    assert look_at_output(config(run, "algorithm.epochs=3.5"))["ends"], "the start that would have been longer died"
    assert look_at_output(config(run, "algorithm.epochs=9"))["rounds"] == 5


@pytest.mark.parametrize(
    ("made", "keys", "kind", "message"),
    [
        ({}, ["algorithm.rounds=1"], ConfigError, "the run has done 2 rounds, more than the 1 that"),
        ({"blocks": 1}, ["algorithm.rounds=3"], CheckpointError, "a run of one block cannot get another length"),
        ({"state": False}, ["algorithm.rounds=3"], CheckpointError, "by an earlier version of deca_ds"),
    ],
)
def test_lengths_that_a_finished_run_cannot_get_are_refused(tmp_path, made, keys, kind, message):
    with pytest.raises(kind, match=message):
        look_at_output(config(make_run(tmp_path, **made), *keys))


@pytest.mark.parametrize("name", ["starts.json", "data.json"])
def test_a_length_that_nothing_tells_is_refused_with_the_file(tmp_path, name):
    (make_run(tmp_path) / name).write_text("[torn")
    with pytest.raises(CheckpointError, match=rf"cannot tell how long the run is[\s\S]*{name}"):
        look_at_output(config(tmp_path, "algorithm.epochs=2"))


def schedule(run: Path, rounds: int, blocks: int = 4):
    return build_schedule(config(run), blocks, rounds)


@pytest.mark.parametrize("done", [0, 3, 10, 20, 33, STEPS])
def test_a_run_continues_with_another_length_wherever_it_stands(tmp_path, done):
    check_place(schedule(tmp_path, 7), position(schedule(tmp_path, 2), done))


@pytest.mark.parametrize(
    ("rounds", "blocks", "saved", "message"),
    [
        (1, 4, (2, 4, 21), "the run has done 21 inner steps, more than the 20 that it is to have"),
        (3, 1, (2, 1, 10), "a run of one block cannot get another length"),
        (1, 1, (2, 1, 5), "a run of one block"),
        (2, 3, (2, 4, 18), "the checkpoint stands at"),
        (3, 5, (2, 4, 7), "the checkpoint stands at"),
    ],
)
def test_a_checkpoint_that_the_run_does_not_come_to_is_refused(tmp_path, rounds, blocks, saved, message):
    place = position(schedule(tmp_path, saved[0], saved[1]), saved[2])
    with pytest.raises(UserError, match=message):
        check_place(schedule(tmp_path, rounds, blocks), place)


def test_a_learning_rate_that_depends_on_the_length_is_warned_of(tmp_path):
    longer, saved = schedule(tmp_path, 3), {"done": 7, "of": STEPS}
    assert (
        tell_other_length(config(tmp_path, "optimizer.schedule=constant"), longer, saved)
        == "the run is 60 inner steps long instead of 40"
    )
    warning = tell_other_length(config(tmp_path, "optimizer.lr=0.1"), longer, saved)
    assert warning.startswith("WARNING: the run is 60 inner steps long instead of 40, and optimizer.schedule=cosine")
    rates = [0.05 * (1 + math.cos(math.pi * 7 / steps)) for steps in (60, STEPS)]
    assert warning.endswith(f"step 8 has a learning rate of {rates[0]:.3g} instead of {rates[1]:.3g}")
    finished = tell_other_length(config(tmp_path, "optimizer.lr=0.1"), longer, {"done": STEPS, "of": STEPS})
    assert finished.endswith("step 41 has a learning rate of 0.025 instead of 0")

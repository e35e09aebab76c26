"""A client that is stopped for a while: the others continue without it, and numbers follow the recorded matrices."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from dense_runs import assert_dense, dense
from jobs import BIN, launch

from deca_ds.checkpoint.shards import ShardedModel
from deca_ds.config import load_config

pytestmark = pytest.mark.multiprocess

STOPS, UNTIL, STEPS = 4, 6, 24  # client 2 is away before inner step STOPS, until the others have done UNTIL


@pytest.fixture
def keys(tiny_model, word_files, tmp_path) -> list[str]:
    return [
        *(f"run.output={tmp_path / 'run'}", "run.device=cpu", "cluster.clients=3", "cluster.timeout_s=60"),
        *("gossip.graph=complete", "gossip.wait_s=3", "gossip.chunk_mib=0.002"),
        *(f"model.path={tiny_model}", "algorithm.rounds=1", "algorithm.inner_steps=6", "algorithm.eps=1e-2"),
        *("optimizer.lr=0.003", f"data.per_client=[{','.join(map(str, word_files))}]", "data.max_length=16"),
        *("data.batch_size=4", "data.micro_batch_size=2", "logging.progress=false", "evaluation.max_examples=4"),
    ]


def run(launcher: str, ranks_each: int, keys: list[str], output: Path) -> tuple[str, list[list[list[int]]]]:
    """What the job prints, and whom each step of each client was without."""
    watched = output / "metrics" / "client_000.jsonl"
    late = f"{2 * ranks_each}:{STOPS}:{UNTIL}:{watched}"
    finished = launch(launcher, 3 * ranks_each, keys, script="tests/integration/late_worker.py", LATE=late)
    assert finished.code == 0, finished.output[-4000:]
    assert (output / "DONE").exists()
    skipped = []
    for client in range(3):
        lines = map(json.loads, (output / "metrics" / f"client_{client:03d}.jsonl").read_text().splitlines())
        records = list(lines)
        steps = [record for record in records if record["kind"] == "step"]
        assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
        skipped.append([record.get("skipped", []) for record in steps])
        counted = {str(j): sum(j in without for without in skipped[-1]) for j in range(3)}
        told = [record for record in records if record["kind"] == "evaluation"][-1]["gossip_skipped"]
        assert told == {j: times for j, times in counted.items() if times}
    return finished.output, skipped


def matrices(skipped: list[list[list[int]]]) -> list[np.ndarray]:
    """W of every step, as the clients' metrics tell it."""
    found = []
    for step in range(STEPS):
        matrix = np.full((3, 3), 1 / 3)
        for i in range(3):
            for j in skipped[i][step]:
                assert i in skipped[j][step], f"step {step + 1}: client {i} was without {j}, but not the other way"
                matrix[i, i] += matrix[i, j]
                matrix[i, j] = 0
        found.append(matrix)
    return found


def assert_left_out_and_back(output: str, skipped: list[list[list[int]]]) -> None:
    for client in (0, 1):
        assert all(2 in without for without in skipped[client][STOPS - 1 : UNTIL]), skipped[client]
        assert f"client {client}, inner step {STOPS}: continues without client 2, which is late" in output
        assert f"client 2, inner step {STOPS}: is late for client {client}" in output
        assert f"averages with client {client} again, after " in output
    assert skipped[2][-1] == []


@pytest.mark.parametrize(
    ("launcher", "changes"),
    [("mpirun", ["gossip.clip_radius=0.2"]), ("hand", ["algorithm.method=gt-adam", "run.seed=1"])],
)
def test_a_stopped_client_is_left_out_and_the_numbers_are_those_of_the_matrices(keys, tmp_path, launcher, changes):
    if launcher == "mpirun" and not (BIN / "mpirun").exists():
        pytest.skip("no mpirun")
    keys = [*keys, *changes]
    output, skipped = run(launcher, 1, keys, tmp_path / "run")
    assert_left_out_and_back(output, skipped)
    saved = ShardedModel(tmp_path / "run" / "model")
    assert_dense(saved, dense(load_config(None, keys), matrices(skipped)), changes[0])


def test_of_two_ranks_a_client_one_that_is_stopped_is_left_out_and_comes_back(keys, tmp_path):
    """Every shard's pairs decide for themselves; both clients of an edge tell the same."""
    if not (BIN / "mpirun").exists():
        pytest.skip("no mpirun")
    output, skipped = run("mpirun", 2, [*keys, "data.micro_batch_size=1"], tmp_path / "run")
    assert_left_out_and_back(output, skipped)
    matrices(skipped)

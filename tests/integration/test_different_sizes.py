"""Clients of different numbers of ranks, in real jobs, train what clients of one size train; over both transports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from jobs import launch, word_job

from deca_ds.checkpoint.shards import ShardedModel

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(900)]  # the first test waits for three launches

STEPS = 12  # inner steps of a run
# Changes to the configuration. Shards travel in many chunks, and with gt-adam two tensors of each.
CASES = {
    "deca": {"gossip.graph": "star"},
    "gt-adam": {"gossip.graph": "one_peer_exponential", "algorithm.method": "gt-adam"},
    "clipped": {"gossip.graph": "star", "gossip.clip_radius": 0.03},
    "dec-lora": {"algorithm.method": "dec-lora", "blocks.layers_per_block": "null", "algorithm.inner_steps": STEPS},
}
SIZES = {"even": None, "mpi": [2, 1, 1], "torch": [1, 2, 1]}
CUT = 8  # inner steps that a run is left after; the checkpoint is from amid a block


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model, word_files) -> Path:
    """The output folders of all runs, in three jobs."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("sizes")

    def keys(output: str, sizes: str, **changes: object) -> list[str]:
        every = {
            "run.output": folder / output,
            "cluster.clients": 3,
            "cluster.ranks": "null" if SIZES[sizes] is None else SIZES[sizes],
            "blocks.layers_per_block": 2,
            "algorithm.rounds": 1,
            "algorithm.inner_steps": STEPS // 4,
            "algorithm.b1": 0.8,
            # a gradient is summed up in another order where there are more ranks; with a small eps, rounding of an
            # element of about that size would decide where it goes
            "algorithm.eps": 1e-3,
            "optimizer.weight_decay": 0.1,
            "gossip.chunk_mib": 0.001,
            "evaluation.max_examples": 4,
            **changes,
        }
        return word_job(tiny_model, word_files, **every)

    def job(launcher: str, ranks: int, runs: list[tuple[list[str], int | None]]) -> None:
        listed = folder / "runs.json"
        listed.write_text(json.dumps([{"keys": keys, "leave_after": leave_after} for keys, leave_after in runs]))
        finished = launch(launcher, ranks, [str(listed)], script="tests/integration/resume_worker.py", deadline_s=400)
        assert finished.code == 0, finished.output[-4000:]

    saving = {**CASES["deca"], "checkpoint.every": 4}
    for launcher, sizes, ranks in (("mpirun", "even", 3), ("mpirun", "mpi", 4)):
        runs = [(keys(f"{sizes}/{case}", sizes, **changes), None) for case, changes in CASES.items()]
        job(launcher, ranks, [*runs, (keys(f"cut/{sizes}", sizes, **saving), CUT)])
    resumed = [
        (keys(f"cut/{sizes}", "torch", **saving, **{"run.resume": "require"}), None) for sizes in ("even", "mpi")
    ]
    job("hand", 4, [(keys("torch/deca", "torch", **CASES["deca"]), None), *resumed])
    return folder


def assert_close(run: Path, even: Path) -> None:
    one, other = ShardedModel(run / "model"), ShardedModel(even / "model")
    for name in other.names:
        for client in other.clients:
            got, expected = one.read(name, client), other.read(name, client)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-6, msg=f"client {client}, {name}")
        torch.testing.assert_close(one.mean(name), other.mean(name), rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_over_mpi(folder, case):
    assert ShardedModel(folder / "mpi" / case / "model").ranks == {0: 2, 1: 1, 2: 1}
    assert_close(folder / "mpi" / case, folder / "even" / case)


def test_over_torch(folder):
    assert ShardedModel(folder / "torch/deca/model").ranks == {0: 1, 1: 2, 2: 1}
    assert_close(folder / "torch/deca", folder / "even/deca")


@pytest.mark.parametrize("sizes", ["even", "mpi"])
def test_a_checkpoint_of_clients_of_other_sizes_goes_on(folder, sizes):
    """The worker has compared what it read with the checkpoint, bit by bit."""
    saved = ShardedModel(folder / "cut" / sizes / "checkpoints" / f"step_{CUT:08d}")
    assert list(saved.ranks.values()) == (SIZES[sizes] or [1, 1, 1])
    assert ShardedModel(folder / "cut" / sizes / "model").ranks == {0: 1, 1: 2, 2: 1}
    assert_close(folder / "cut" / sizes, folder / "even/deca")


@pytest.mark.parametrize("case", CASES)
def test_scores_and_traffic_are_those_of_clients_of_one_size(folder, case):
    runs = [folder / sizes / case / "metrics" for sizes in ("mpi", "even")]
    for one, other in zip(*(records(run / "job.jsonl") for run in runs), strict=True):
        assert one["mean"]["loss"] == pytest.approx(other["mean"]["loss"], abs=1e-5)
        assert one["consensus_distance"] == pytest.approx(other["consensus_distance"], rel=1e-3, abs=1e-6)
    for client in range(3):
        one, other = (records(run / f"client_{client:03d}.jsonl") for run in runs)
        losses = [[record["loss"] for record in run if record["kind"] == "step"] for run in (one, other)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5) and len(losses[0]) == STEPS
        assert one[-1]["gossip_bytes_sent"] == other[-1]["gossip_bytes_sent"] > 0


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]

"""Clients of different numbers of ranks, in real jobs, train what clients of one size train; over both transports."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from histories import assert_metrics, simulate
from jobs import launch, word_job
from rounding import UNIT, Noise, assert_close

from deca_ds.checkpoint.shards import ShardedModel
from deca_ds.config import load_config
from deca_ds.simulation.setup import build
from deca_ds.simulation.simulate import Simulation

pytestmark = pytest.mark.multiprocess

STEPS = 12  # inner steps of a run
# Changes to the configuration. Shards travel in many chunks, and with gt-adam two tensors of each.
CASES = {
    "deca": {"gossip.graph": "star"},
    "gt-adam": {"gossip.graph": "one_peer_exponential", "algorithm.method": "gt-adam"},
    "clipped": {"gossip.graph": "star", "gossip.clip_radius": 0.03},
    "dec-lora": {"algorithm.method": "dec-lora", "blocks.layers_per_block": "null", "algorithm.inner_steps": STEPS},
}
SIZES = {"even": None, "mpi": [2, 1, 1], "torch": [1, 2, 1]}
CUT = 8  # inner steps that a run is left after; the checkpoint is from the middle of an activation


@pytest.fixture(scope="module")
def keys(tmp_path_factory, tiny_model, word_files):
    folder = tmp_path_factory.mktemp("sizes")

    def make(output: str, sizes: str, **changes: object) -> list[str]:
        every = {
            "run.output": folder / output,
            "cluster.clients": 3,
            "cluster.ranks": "null" if SIZES[sizes] is None else SIZES[sizes],
            "blocks.layers_per_block": 2,
            "algorithm.rounds": 1,
            "algorithm.inner_steps": STEPS // 4,
            "algorithm.b1": 0.8,
            "algorithm.eps": 1e-2,  # see rounding.py
            "optimizer.weight_decay": 0.1,
            "gossip.chunk_mib": 0.001,
            "evaluation.max_examples": 4,
            **changes,
        }
        return word_job(tiny_model, word_files, **every)

    return make


@pytest.fixture(scope="module")
def folder(keys) -> Path:
    """The output folders of all runs, in three jobs."""
    pytest.importorskip("peft")
    folder = Path(load_config(None, keys("", "even")).run.output)

    def job(launcher: str, ranks: int, runs: list[tuple[list[str], int | None]]) -> None:
        listed = folder / "runs.json"
        listed.write_text(json.dumps([{"keys": keys, "leave_after": leave_after} for keys, leave_after in runs]))
        finished = launch(launcher, ranks, [str(listed)], script="tests/integration/resume_worker.py", deadline_s=800)
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


@pytest.fixture(scope="module")
def assert_expected(folder, keys):
    """assert_expected(run, case): models and metrics are what the simulator has for that case, which knows no ranks."""

    @cache
    def simulated(case: str) -> list[Simulation]:
        return [simulate(keys("", "even", **CASES[case]), noise=noise) for noise in (None, Noise())]

    def check(run: str, case: str, metrics: bool = True) -> None:
        saved, simulations = ShardedModel(folder / run / "model"), simulated(case)
        start = dict(build(load_config(None, keys("", "even", **CASES[case]))).clients.parameters(0))
        held = [[dict(s.clients.parameters(client)) for client in saved.clients] for s in simulations]
        got = [{name: saved.read(name, client) for name in start} for client in saved.clients]
        assert_close(got, *held, start, run)
        for name in start:
            mean = torch.stack([client[name] for client in got]).double().mean(dim=0)
            torch.testing.assert_close(saved.mean(name).double(), mean, rtol=4 * UNIT, atol=4 * UNIT)
        if metrics:
            assert_metrics(folder / run, *simulations)

    return check


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sizes", ["even", "mpi"])
def test_over_mpi_clients_of_different_sizes_train_what_those_of_one_size_train(folder, assert_expected, sizes, case):
    ranks = SIZES[sizes] or [1, 1, 1]
    assert ShardedModel(folder / sizes / case / "model").ranks == dict(enumerate(ranks))
    assert_expected(f"{sizes}/{case}", case)


def test_over_torch_clients_of_different_sizes_train_what_those_of_one_size_train(folder, assert_expected):
    assert ShardedModel(folder / "torch/deca/model").ranks == {0: 1, 1: 2, 2: 1}
    assert_expected("torch/deca", "deca")


@pytest.mark.parametrize("sizes", ["even", "mpi"])
def test_a_checkpoint_of_clients_of_other_sizes_continues(folder, assert_expected, sizes):
    """The worker has compared what it read with the checkpoint, bit by bit."""
    saved = ShardedModel(folder / "cut" / sizes / "checkpoints" / f"step_{CUT:08d}")
    assert list(saved.ranks.values()) == (SIZES[sizes] or [1, 1, 1])
    assert ShardedModel(folder / "cut" / sizes / "model").ranks == {0: 1, 1: 2, 2: 1}
    assert_expected(f"cut/{sizes}", "deca", metrics=False)  # other ranks' traffic is not counted on

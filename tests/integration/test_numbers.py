"""Real jobs, started as users start them, against dense references of the same run."""

from __future__ import annotations

import json
import random
from functools import cache
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_reference import model_gradient
from dense_runs import assert_dense, batches_of, dense, dense_model
from histories import assert_metrics, assert_mostly_simulated, assert_simulated
from jobs import as_on, launch, word_job
from rounding import Noise, assert_close

from deca_ds.algorithm.methods import METHODS
from deca_ds.checkpoint.shards import ShardedModel
from deca_ds.config import load_config

pytestmark = pytest.mark.multiprocess

EPS = 1e-2  # see rounding.py
THIRD = 1 / 3
STAR_OF_3 = np.array([[THIRD, THIRD, THIRD], [THIRD, 2 / 3, 0], [THIRD, 0, 2 / 3]])  # Metropolis-Hastings, centre 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("numbers")


@pytest.fixture(scope="module")
def overrides(tiny_model, word_files, folder):
    """Three clients with a file each; everything that a case does not change."""
    numbers = iter(count())

    def make(**changes: object) -> list[str]:
        keys = {
            "run.output": folder / f"run{next(numbers)}",
            "cluster.clients": 3,
            "blocks.layers_per_block": 2,
            "algorithm.rounds": 2,
            "algorithm.inner_steps": 3,
            "algorithm.b1": 0.8,
            "algorithm.eps": EPS,
            "optimizer.weight_decay": 0.1,
            "evaluation.max_examples": 4,
            **changes,
        }
        return word_job(tiny_model, word_files, **keys)

    return make


def run(launcher: str, ranks: int, arguments: list[str]) -> ShardedModel:
    finished = launch(launcher, ranks, arguments)
    assert finished.code == 0, finished.output[-4000:]
    output = Path(load_config(None, arguments).run.output)
    assert (output / "DONE").exists() and not (output / "FAILED").exists()
    return ShardedModel(output / "model")


def run_all(
    launcher: str, ranks: int, folder: Path, runs: list[list[str]], processor: str | None = None
) -> list[ShardedModel]:
    """Several runs of one layout in one job. processor: see jobs.py."""
    listed = folder / "runs.json"
    listed.write_text(json.dumps(runs))
    environment = as_on(processor)
    finished = launch(
        launcher, ranks, [str(listed)], script="tests/integration/runs_worker.py", deadline_s=800, **environment
    )
    assert finished.code == 0, finished.output[-4000:]
    if environment:
        told = f"computes with {environment['ATEN_CPU_CAPABILITY'].upper()}\n"
        assert finished.output.count(told) == ranks, finished.output[-4000:]
    return [ShardedModel(Path(load_config(None, arguments).run.output) / "model") for arguments in runs]


ONE_PEER_OF_3 = [(np.eye(3) + np.roll(np.eye(3), hops, axis=0)) / 2 for hops in (1, 2)]  # from client i - hops
TWO_OF_3 = np.array([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
BASE_OF_3 = [TWO_OF_3, np.array([[THIRD, 0.0, 2 * THIRD], [0.0, 1.0, 0.0], [2 * THIRD, 0.0, THIRD]]), TWO_OF_3]


def pairs_of_3(seed: int) -> list[np.ndarray]:
    """Four times the first two of three clients in a random order average; all three have met by then."""
    draw, matrices = random.Random(seed), []
    for _ in range(4):
        a, b, _ = draw.sample(range(3), 3)
        matrices.append(np.eye(3))
        matrices[-1][[[a], [b]], [a, b]] = 0.5
    return matrices


MATRICES = {
    "ring": [np.full((3, 3), THIRD)],
    "complete": [np.full((3, 3), THIRD)],
    "star": [STAR_OF_3],
    "one_peer_exponential": ONE_PEER_OF_3,
    "base": BASE_OF_3,  # a client has no neighbour each time
    "random_pairs": pairs_of_3(seed=0),
}
SMOOTH = {"algorithm.eps": 0.1}  # moments of normalised signals are larger, and so is what noise makes of them
WHOLE = {"blocks.layers_per_block": "null"}
ONE_ROUND = {"algorithm.rounds": 1}
# (changes to the configuration, graph, gossip.every) of the runs of each layout: (launcher, ranks a client). In the
# first one ranks share a client: for what needs sums over them, more buffers than moments, or a model of one block.
CASES = {
    ("mpirun", 2): [
        ({"algorithm.signal": "none"}, "ring", 1),
        ({"algorithm.signal": "quasi_global_norm", **SMOOTH}, "star", 1),
        ({"algorithm.method": "gossip-adam", **WHOLE}, "star", 1),
        ({"algorithm.method": "qg-adam", **SMOOTH}, "star", 2),
        ({"algorithm.method": "gt-adam"}, "star", 1),
        ({"gossip.clip_radius": 0.03}, "one_peer_exponential", 1),
    ],
    ("hand", 1): [
        ({"optimizer.schedule": "cosine", **ONE_ROUND}, "base", 1),  # the defaults
        ({"algorithm.signal": "descent"}, "star", 2),
        ({"algorithm.signal": "disagreement", **ONE_ROUND}, "base", 1),
        ({"algorithm.signal": "transcribed", **ONE_ROUND}, "complete", 1),
        ({"algorithm.signal": "trivial", **ONE_ROUND}, "ring", 1),
        ({"algorithm.signal": "fade"}, "star", 1),
        # its scale is 1 / lr: moments grow, so that steps stay small only with more memory
        ({"algorithm.signal": "quasi_global", "algorithm.b1": 0.99}, "star", 2),
        ({"algorithm.method": "local-adam", **WHOLE}, "complete", 4),
        ({"algorithm.method": "qg-adam", **SMOOTH, **WHOLE}, "one_peer_exponential", 1),
        ({"algorithm.method": "gt-adam", **WHOLE}, "one_peer_exponential", 1),
        ({"algorithm.method": "diloco", **WHOLE}, "complete", 4),
        ({"algorithm.method": "gasloc"}, "star", 2),
        ({"algorithm.method": "noloco"}, "random_pairs", 2),
        ({"algorithm.method": "badam"}, "isolated", 1),
        ({"algorithm.method": "adamw", **WHOLE}, "isolated", 1),
    ],
}
# a method that has no case above yet; adapters: test_dec_lora.py
HAVE_CASES = {changes.get("algorithm.method", "deca") for cases in CASES.values() for changes, *_ in cases}
CASES["hand", 1] += [
    ({"algorithm.method": name, **(WHOLE if row.whole_model else {})}, "isolated" if row.alone else "star", 2)
    for name, row in METHODS.items()
    if name not in HAVE_CASES and not row.adapters
]


# A step costs what its passes through DeepSpeed's hooks cost.
ONE_PASS, TWO_PASSES = {"data.micro_batch_size": 4}, {"data.micro_batch_size": 2}
PLAIN = {"gossip.graph": "star"}  # is run in each layout as well, with gradients accumulated where one rank is a client
# In the larger layout blocks become active again in PLAIN alone.
CHEAPER = {("mpirun", 2): ONE_ROUND, ("hand", 1): ONE_PASS}
PROCESSORS = {("mpirun", 2): "oldest", ("hand", 1): "avx2"}  # the simulated runs are on this machine's own


@pytest.fixture(scope="module")
def trained(overrides, folder):
    """layout -> the arguments and the model of each of its cases and of PLAIN, in one job for each layout."""

    @cache
    def of(layout: tuple[str, int]) -> tuple[list[list[str]], list[ShardedModel]]:
        launcher, ranks_each = layout
        runs = [
            overrides(**CHEAPER[layout], **changes, **{"gossip.graph": graph, "gossip.every": every})
            for changes, graph, every in CASES[layout]
        ]
        runs.append(overrides(**PLAIN))
        return runs, run_all(launcher, 3 * ranks_each, folder, runs, PROCESSORS[layout])

    return of


@pytest.mark.parametrize("layout", CASES, ids=str)
def test_clients_equal_the_dense_reference(trained, layout):
    """Every signal and every method, in real processes."""
    runs, models = trained(layout)
    for (changes, graph, _), arguments, saved in zip(CASES[layout], runs[:-1], models[:-1], strict=True):
        reference = dense(load_config(None, arguments), MATRICES.get(graph, [np.eye(3)]))
        assert_dense(saved, reference, str(changes))


SIMULATED = [
    ({}, "erdos_renyi", 1),
    ({"algorithm.signal": "quasi_global_norm", **SMOOTH, **ONE_ROUND}, "star", 2),
    ({"algorithm.method": "gt-adam"}, "base", 1),
    ({"algorithm.method": "diloco", **WHOLE, **ONE_ROUND}, "complete", 3),
    ({"gossip.clip_radius": 0.03, "model.init": "random", **ONE_ROUND}, "star", 1),
    ({"model.dtype": "bfloat16", **TWO_PASSES}, "isolated", 1),
    ({"gossip.wire": "bfloat16", **TWO_PASSES, **ONE_ROUND}, "star", 1),
]


def test_the_simulator_equals_real_processes(overrides, folder, word_files):
    """Four clients in one process, and in four."""
    fourth = folder / "fourth.jsonl"
    fourth.write_text("".join(Path(path).read_text() for path in word_files[:2]))
    files = {"data.per_client": f"[{','.join(map(str, [*word_files, fourth]))}]", "cluster.clients": 4}
    runs = [
        overrides(
            **files, **ONE_PASS | changes, **{"gossip.graph": graph, "gossip.every": every, "evaluation.every": 5}
        )
        for changes, graph, every in SIMULATED
    ]
    for arguments, saved in zip(runs, run_all("mpirun", 4, folder, runs), strict=True):
        config = load_config(None, arguments)
        if "bfloat16" in (config.model.dtype, config.gossip.wire):
            assert_mostly_simulated(saved.read, arguments)
        else:
            assert_metrics(Path(config.run.output), *assert_simulated(saved.read, arguments))


def test_one_client_equals_torch_adamw_block_by_block(overrides):
    arguments = overrides(**{"cluster.clients": 1, "data.per_client": "[]", "data.train": "[WORDS]"})
    config = load_config(None, overrides())
    arguments = [a.replace("WORDS", config.data.per_client[0]) for a in arguments]
    saved = run("python", 1, arguments)
    start, exact, noisy = (torch_adamw(load_config(None, arguments), **how) for how in ADAMW_RUNS)
    assert_close([{name: saved.read(name, 0) for name in start}], [exact], [noisy], start, "AdamW")


ADAMW_RUNS = [{"rounds": 0}, {"rounds": 2}, {"rounds": 2, "noise": Noise()}]


def torch_adamw(config, rounds: int, noise: Noise | None = None) -> dict[str, np.ndarray]:
    """What torch's own optimizer makes of the model."""
    (batches,), (model, blocks) = batches_of(config), dense_model(config)
    parameters = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    for _ in range(rounds):
        for names in blocks:
            block = {name: torch.nn.Parameter(torch.from_numpy(parameters[name])) for name in names}
            groups = [
                {"params": [p for p in block.values() if p.dim() >= 2], "weight_decay": 0.1},
                {"params": [p for p in block.values() if p.dim() < 2], "weight_decay": 0.0},
            ]
            adamw = torch.optim.AdamW([group for group in groups if group["params"]], lr=0.003, eps=EPS)
            for _ in range(3):
                weights = parameters
                if noise is not None:
                    weights = {name: noise.weights(values) for name, values in parameters.items()}
                gradients, _ = model_gradient(model, weights, next(batches))
                for name, p in block.items():
                    p.grad = torch.from_numpy(gradients[name])
                torch.nn.utils.clip_grad_norm_(block.values(), 1.0)
                adamw.step()  # in place, which changes `parameters`
                if noise is not None:
                    for name in names:
                        parameters[name][...] = noise.parameters(parameters[name])
    return parameters


def test_transport_chunks_ranks_and_accumulation_change_nothing(overrides, trained, folder):
    """Torch and MPI give the same bits; one chunk and many, 2 ranks and 1 with accumulation are equal to rounding."""
    launcher, ranks = layout = ("hand", 1)
    (arguments, (*_, one)), (_, (*_, two)) = trained(layout), trained(("mpirun", 2))
    runs = [overrides(**PLAIN), overrides(**PLAIN, **{"gossip.chunk_mib": 0.001})]
    again, chunked = run_all("mpirun", 3 * ranks, folder, runs, PROCESSORS[layout])
    assert one.ranks == again.ranks == chunked.ranks != two.ranks
    for client in range(3):
        for name in one.names:
            assert torch.equal(one.read(name, client), again.read(name, client)), name
    reference = dense(load_config(None, arguments[-1]), [STAR_OF_3])
    for saved, what in ((one, launcher), (two, "two ranks"), (chunked, "chunks")):
        assert_dense(saved, reference, what)

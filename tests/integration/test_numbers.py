"""Real jobs, started as users start them, against dense references of the same run."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_reference import Coefficients
from dense_reference import train as dense_train
from jobs import launch, word_job
from transformers import AutoModelForCausalLM, AutoTokenizer

from deca_ds.checkpoint.shards import ShardedModel
from deca_ds.config import load_config
from deca_ds.data import load_client_data, training_batches
from deca_ds.simulation.setup import build as build_simulation

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(900)]  # ten runs and their references in a test

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
            # with 1e-8, rounding of a gradient element of about that size would decide where the element goes
            "algorithm.eps": 1e-4,
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


def run_all(launcher: str, ranks: int, folder: Path, runs: list[list[str]]) -> list[ShardedModel]:
    """Several runs of one layout in one job."""
    listed = folder / "runs.json"
    listed.write_text(json.dumps(runs))
    finished = launch(launcher, ranks, [str(listed)], script="tests/integration/runs_worker.py", deadline_s=400)
    assert finished.code == 0, finished.output[-4000:]
    return [ShardedModel(Path(load_config(None, arguments).run.output) / "model") for arguments in runs]


def dense_inputs(arguments: list[str]):
    config = load_config(None, arguments)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    batches = []
    for client in range(config.cluster.clients):
        data = load_client_data(config, tokenizer, client)
        steps = training_batches(
            data.train, batch_size=4, micro_batch_size=4, rank=0, ranks=1, seed=config.run.seed, client=client, pad_id=0
        )
        batches.append(step[0] for step in steps)
    model = AutoModelForCausalLM.from_pretrained(config.model.path)
    names = [name for name, _ in model.named_parameters()]
    layer = lambda *indices: [n for n in names if any(f".layers.{i}." in n for i in indices)]  # noqa: E731
    blocks = [["model.embed_tokens.weight"], layer(0, 1), layer(2), ["model.norm.weight", "lm_head.weight"]]
    if config.blocks.layers_per_block is None:
        blocks = [sum(blocks, [])]
    assert sorted(sum(blocks, [])) == sorted(names)
    return config, model, blocks, batches


ONE_PEER_OF_3 = [(np.eye(3) + np.roll(np.eye(3), hops, axis=0)) / 2 for hops in (1, 2)]  # from client i - hops
MATRICES = {
    "ring": [np.full((3, 3), THIRD)],
    "complete": [np.full((3, 3), THIRD)],
    "star": [STAR_OF_3],
    "one_peer_exponential": ONE_PEER_OF_3,
}
SMOOTH = {"algorithm.eps": 1e-3}  # v keeps little of the gradient, so that rounding decides small steps sooner
WHOLE = {"blocks.layers_per_block": "null"}
# (changes to the configuration, graph, gossip.every) of the runs of each layout: (launcher, ranks a client)
CASES = {
    ("mpirun", 2): [
        ({"algorithm.signal": "none"}, "ring", 1),
        ({"algorithm.signal": "disagreement"}, "one_peer_exponential", 1),
        ({"algorithm.signal": "transcribed"}, "complete", 1),
        ({"algorithm.signal": "quasi_global_norm"}, "star", 1),
        ({"algorithm.signal": "trivial"}, "ring", 1),
        ({"algorithm.method": "gossip-adam", **WHOLE}, "star", 1),
        ({"algorithm.method": "qg-adam", **SMOOTH}, "star", 2),
        ({"algorithm.method": "gt-adam"}, "star", 1),
        ({"gossip.clip_radius": 0.03}, "one_peer_exponential", 1),
    ],
    ("hand", 1): [
        ({"algorithm.signal": "descent"}, "star", 2),
        # its scale is 1 / lr: moments grow, so that steps stay small only with more memory
        ({"algorithm.signal": "quasi_global", "algorithm.b1": 0.99}, "star", 2),
        ({"algorithm.method": "local-adam", **WHOLE}, "complete", 4),
        ({"algorithm.method": "qg-adam", **SMOOTH, **WHOLE}, "one_peer_exponential", 1),
        ({"algorithm.method": "gt-adam", **WHOLE}, "one_peer_exponential", 1),
        ({"algorithm.method": "diloco", **WHOLE}, "complete", 4),
        ({"algorithm.method": "badam"}, "isolated", 1),
        ({"algorithm.method": "adamw", **WHOLE}, "isolated", 1),
    ],
}


PLAIN = {"gossip.graph": "star"}  # is run in each layout as well


@pytest.fixture(scope="module")
def trained(overrides, folder):
    """layout -> the arguments and the model of each of its cases and of PLAIN, in one job for each layout."""

    @cache
    def of(layout: tuple[str, int]) -> tuple[list[list[str]], list[ShardedModel]]:
        launcher, ranks_each = layout
        runs = [
            overrides(**changes, **{"gossip.graph": graph, "gossip.every": every})
            for changes, graph, every in CASES[layout]
        ]
        runs.append(overrides(**PLAIN))
        return runs, run_all(launcher, 3 * ranks_each, folder, runs)

    return of


@pytest.mark.parametrize("layout", CASES, ids=str)
def test_clients_equal_the_dense_reference(trained, layout):
    """Every signal and every method, in real processes."""
    runs, models = trained(layout)
    for (changes, graph, every), arguments, saved in zip(CASES[layout], runs[:-1], models[:-1], strict=True):
        config, model, blocks, batches = dense_inputs(arguments)
        start = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
        a = config.algorithm
        coefficients = Coefficients(a.method, a.signal, a.a1, a.a2, a.b1, a.b2, a.eps, a.outer_lr, a.outer_momentum)
        coefficients = replace(coefficients, clip_radius=config.gossip.clip_radius)
        matrices = MATRICES.get(graph, [np.eye(3)])
        expected = dense_train(
            coefficients, model, blocks, batches, matrices, rounds=2, inner_steps=3, every=every, lr=0.003, decay=0.1,
            clip=1.0,
        )  # fmt: skip
        for client in range(3):
            for name, values in expected[client].items():
                got, where = saved.read(name, client).double().numpy(), f"{changes}: client {client}, {name}"
                np.testing.assert_allclose(got, values, rtol=0, atol=1e-5, err_msg=where)
                assert not np.allclose(got, start[name], atol=1e-4), f"{where} was never trained"


SIMULATED = [
    ({}, "erdos_renyi", 1),
    ({"algorithm.signal": "quasi_global_norm"}, "star", 2),
    ({"algorithm.method": "gt-adam"}, "one_peer_exponential", 1),
    ({"algorithm.method": "diloco", **WHOLE}, "complete", 3),
    ({"gossip.clip_radius": 0.03, "model.init": "random"}, "star", 1),
    ({"model.dtype": "bfloat16"}, "isolated", 1),
]


def test_the_simulator_equals_real_processes(overrides, folder, word_files):
    """Four clients in one process, and in four."""
    fourth = folder / "fourth.jsonl"
    fourth.write_text("".join(Path(path).read_text() for path in word_files[:2]))
    files = {"data.per_client": f"[{','.join(map(str, [*word_files, fourth]))}]", "cluster.clients": 4}
    runs = [
        overrides(**files, **changes, **{"gossip.graph": graph, "gossip.every": every, "evaluation.every": 5})
        for changes, graph, every in SIMULATED
    ]
    for arguments, saved in zip(runs, run_all("mpirun", 4, folder, runs), strict=True):
        config = load_config(None, arguments)
        simulation = build_simulation(config)
        for _ in simulation.run():
            pass
        for client in range(4):
            for name, values in simulation.clients.parameters(client):
                torch.testing.assert_close(saved.read(name, client), values, rtol=0, atol=1e-5, msg=f"{client} {name}")
        read = lambda file, config=config: [  # noqa: E731
            json.loads(line) for line in (Path(config.run.output) / "metrics" / file).read_text().splitlines()
        ]
        job, clients = read("job.jsonl"), [read(f"client_{client:03d}.jsonl") for client in range(4)]
        assert [record["step"] for record in job] == [record["step"] for record in simulation.evaluations]
        for real, simulated in zip(job, simulation.evaluations, strict=True):
            assert real["consensus_distance"] == pytest.approx(simulated["consensus_distance"], rel=1e-3, abs=1e-6)
            assert real["mean"]["loss"] == pytest.approx(simulated["mean"]["loss"], abs=1e-5)
        for client, records in enumerate(clients):
            losses = [record["loss"] for record in records if record["kind"] == "step"]
            assert losses == pytest.approx([record["loss"][client] for record in simulation.steps], abs=1e-5)
            scored = [record for record in records if record["kind"] == "evaluation"]
            for real, simulated in zip(scored, simulation.evaluations, strict=True):
                assert real["own"]["loss"] == pytest.approx(simulated["clients"][client]["own"]["loss"], abs=1e-5)
            assert scored[-1]["gossip_bytes_sent"] == simulation.steps[-1]["bytes_sent"][client]


def test_one_client_equals_torch_adamw_block_by_block(overrides):
    arguments = overrides(**{"cluster.clients": 1, "data.per_client": "[]", "data.train": "[WORDS]"})
    config = load_config(None, overrides())
    arguments = [a.replace("WORDS", config.data.per_client[0]) for a in arguments]
    saved = run("python", 1, arguments)
    _, model, blocks, (batches,) = dense_inputs(arguments)
    parameters = dict(model.named_parameters())
    for _ in range(2):
        for names in blocks:
            block = [parameters[name] for name in names]
            groups = [
                {"params": [p for p in block if p.dim() >= 2], "weight_decay": 0.1},
                {"params": [p for p in block if p.dim() < 2], "weight_decay": 0.0},
            ]
            adamw = torch.optim.AdamW([group for group in groups if group["params"]], lr=0.003, eps=1e-4)
            for _ in range(3):
                batch = next(batches)
                model.zero_grad()
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                torch.nn.functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100
                ).backward()
                torch.nn.utils.clip_grad_norm_(block, 1.0)
                adamw.step()
    for name, parameter in parameters.items():
        torch.testing.assert_close(saved.read(name, 0), parameter.detach(), rtol=0, atol=1e-6, msg=name)


def test_transport_chunks_ranks_and_accumulation_change_nothing(overrides, trained):
    """Torch and MPI, one chunk and many, give the same bits; 2 ranks equal 1 rank with accumulation to rounding."""
    (_, (*_, one)), (_, (*_, two)) = trained(("hand", 1)), trained(("mpirun", 2))
    again = run("mpirun", 3, overrides(**PLAIN, **{"gossip.chunk_mib": 0.001}))
    assert one.ranks == again.ranks != two.ranks
    for client in range(3):
        for name in one.names:
            values = one.read(name, client)
            assert torch.equal(values, again.read(name, client)), name
            torch.testing.assert_close(values, two.read(name, client), rtol=0, atol=1e-6)

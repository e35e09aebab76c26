"""Real jobs, started as users start them, against dense references of the same run."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_reference import train as dense_train
from jobs import launch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deca_ds.checkpoint.shards import ShardedModel
from deca_ds.config import load_config
from deca_ds.data import load_client_data, training_batches

pytestmark = pytest.mark.multiprocess

THIRD = 1 / 3
STAR_OF_3 = np.array([[THIRD, THIRD, THIRD], [THIRD, 2 / 3, 0], [THIRD, 0, 2 / 3]])  # Metropolis-Hastings, centre 0


@pytest.fixture
def overrides(tiny_model, word_files, tmp_path):
    """Three clients with a file each; everything that a case does not change."""
    numbers = iter(count())

    def make(**changes: object) -> list[str]:
        keys = {
            "run.output": tmp_path / f"run{next(numbers)}",
            "run.device": "cpu",
            "cluster.clients": 3,
            "cluster.timeout_s": 60,
            "model.path": tiny_model,
            "blocks.layers_per_block": 2,
            "algorithm.rounds": 2,
            "algorithm.inner_steps": 3,
            "algorithm.b1": 0.8,
            # with 1e-8, rounding of a gradient element of about that size would decide where the element goes
            "algorithm.eps": 1e-4,
            "optimizer.lr": 0.003,
            "optimizer.weight_decay": 0.1,
            "data.per_client": f"[{','.join(map(str, word_files))}]",
            "data.max_length": 16,
            "data.batch_size": 4,
            "data.micro_batch_size": 2,
            "logging.progress": False,
            **changes,
        }
        return [f"{key}={value}" for key, value in keys.items()]

    return make


def run(launcher: str, ranks: int, arguments: list[str]) -> ShardedModel:
    finished = launch(launcher, ranks, arguments)
    assert finished.code == 0, finished.output[-4000:]
    output = Path(load_config(None, arguments).run.output)
    assert (output / "DONE").exists() and not (output / "FAILED").exists()
    return ShardedModel(output / "model")


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
    assert sorted(sum(blocks, [])) == sorted(names)
    return config, model, blocks, batches


@pytest.mark.parametrize(
    ("signal", "graph", "matrices", "launcher", "ranks_each", "every"),
    [
        ("none", "ring", [np.full((3, 3), THIRD)], "mpirun", 1, 1),
        ("descent", "star", [STAR_OF_3], "deepspeed", 2, 2),
        ("transcribed", "complete", [np.full((3, 3), THIRD)], "deepspeed", 1, 1),
        ("disagreement", "one_peer_exponential", None, "mpirun", 1, 1),
        ("quasi_global", "star", [STAR_OF_3], "mpirun", 1, 2),
        ("quasi_global_norm", "star", [STAR_OF_3], "mpirun", 2, 1),
        ("trivial", "ring", [np.full((3, 3), THIRD)], "mpirun", 1, 1),
    ],
)
def test_clients_equal_the_dense_reference(overrides, signal, graph, matrices, launcher, ranks_each, every):
    changes = {"algorithm.signal": signal, "gossip.graph": graph, "gossip.every": every}
    if signal == "quasi_global":  # its scale is 1 / lr: moments grow, so that steps stay small only with more memory
        changes["algorithm.b1"] = 0.99
    arguments = overrides(**changes)
    saved = run(launcher, 3 * ranks_each, arguments)
    if matrices is None:  # one-peer exponential on 3 clients: half from the client 1, then 2 places before
        shift = np.roll(np.eye(3), 1, axis=1).T
        matrices = [(np.eye(3) + np.linalg.matrix_power(shift, hops)) / 2 for hops in (1, 2)]

    config, model, blocks, batches = dense_inputs(arguments)
    algorithm = config.algorithm
    expected, _ = dense_train(
        model, blocks, batches, matrices, rounds=2, inner_steps=3, every=every, signal=signal,
        a1=algorithm.a1, a2=algorithm.a2, b1=algorithm.b1, b2=algorithm.b2, eps=algorithm.eps,
        lr=0.003, decay=0.1, clip=1.0,
    )  # fmt: skip
    start = dict(AutoModelForCausalLM.from_pretrained(config.model.path).named_parameters())
    for client in range(3):
        for name, values in expected[client].items():
            got = saved.read(name, client).double().numpy()
            np.testing.assert_allclose(got, values, rtol=0, atol=1e-5, err_msg=f"client {client}, {name}")
            assert not np.allclose(got, start[name].detach().numpy(), atol=1e-4), f"{name} was never trained"


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


def test_transport_chunks_ranks_and_accumulation_change_nothing(overrides):
    """Torch and MPI, one chunk and many, give the same bits; 2 ranks equal 1 rank with accumulation to rounding."""
    one = run("deepspeed", 3, overrides(**{"gossip.graph": "star"}))
    again = run("mpirun", 3, overrides(**{"gossip.graph": "star", "gossip.chunk_mib": 0.001}))
    two = run("mpirun", 6, overrides(**{"gossip.graph": "star"}))
    for client in range(3):
        for name in one.names:
            values = one.read(name, client)
            assert torch.equal(values, again.read(name, client)), name
            torch.testing.assert_close(values, two.read(name, client), rtol=0, atol=1e-6)

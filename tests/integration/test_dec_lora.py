"""dec-lora in real processes, against a dense reference without adapters: weights W + alpha / rank B A and autograd."""

from __future__ import annotations

import json
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dense_reference import Coefficients, activation
from dense_runs import batches_of
from jobs import launch
from rounding import MARGIN, UNIT, Noise, assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from deca_ds.checkpoint.adapters import read_adapters
from deca_ds.checkpoint.export import export_model
from deca_ds.checkpoint.shards import ShardedModel
from deca_ds.config import load_config
from deca_ds.data import evaluation_batches, load_client_data
from deca_ds.engine.adapters import add_adapters
from deca_ds.engine.losses import token_scores
from deca_ds.engine.masters import rounded
from deca_ds.run_folder import ADAPTERS

pytestmark = pytest.mark.multiprocess

CLIENTS, STEPS = 3, 6
THIRD = 1 / 3
RING = np.full((3, 3), THIRD)
STAR = np.array([[THIRD, THIRD, THIRD], [THIRD, 2 / 3, 0], [THIRD, 0, 2 / 3]])  # Metropolis-Hastings, centre 0
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# ranks a client: the matrix of the graph, averagings, neighbours of each client, adapted layers, what else is set
CASES = {
    1: (RING, 6, [2, 2, 2], LINEAR, {"gossip.graph": "ring"}),
    2: (STAR, 3, [2, 1, 1], ["q_proj", "down_proj"], {"gossip.graph": "star", "gossip.every": 2, "lora.rank": 3}),
}
UNTRAINED = {"gossip.graph": "isolated", "optimizer.lr": 0, "algorithm.rounds": 1, "algorithm.inner_steps": 2}
ROUNDED = {"model.dtype": "bfloat16", "model.gradient_checkpointing": True, "lora.dropout": 0.2}


@pytest.fixture(scope="module", params=CASES, ids="{} ranks".format)
def runs(request, tiny_model, word_files, tmp_path_factory):
    """(case, arguments of its run, of one that trains nothing, of one in bfloat16), run in one job."""
    folder = tmp_path_factory.mktemp("dec-lora")
    case = CASES[request.param]
    common = {
        "run.device": "cpu",
        "cluster.clients": CLIENTS,
        "cluster.timeout_s": 60,
        "model.path": tiny_model,
        "blocks.layers_per_block": "null",
        "algorithm.method": "dec-lora",
        "algorithm.rounds": 2,
        "algorithm.inner_steps": 3,
        "algorithm.eps": 1e-2,  # see rounding.py
        "lora.rank": 4,
        "lora.alpha": 6,
        "lora.target_modules": "[]" if case[3] == LINEAR else f"[{','.join(case[3])}]",
        "optimizer.lr": 0.01,
        "optimizer.schedule": "constant",
        "optimizer.weight_decay": 0.1,
        "data.per_client": f"[{','.join(map(str, word_files))}]",
        "data.max_length": 16,
        "data.batch_size": 4,
        "data.micro_batch_size": 2,
        "logging.progress": False,
    }
    changes = [case[4], case[4] | UNTRAINED, case[4] | ROUNDED]
    arguments = [
        [f"{key}={value}" for key, value in (common | change | {"run.output": folder / f"run{i}"}).items()]
        for i, change in enumerate(changes)
    ]
    (folder / "runs.json").write_text(json.dumps(arguments))
    worker = "tests/integration/runs_worker.py"
    finished = launch("mpirun", CLIENTS * request.param, [str(folder / "runs.json")], script=worker)
    assert finished.code == 0, finished.output[-4000:]
    return case, *arguments


def opened(arguments):
    config = load_config(None, arguments)
    run = Path(config.run.output)
    return config, run, ShardedModel(run / "model"), read_adapters(run)


def drawn(config) -> dict[str, torch.Tensor]:
    """The parameters of an ordinary, unpartitioned model with fresh adapters."""
    model = AutoModelForCausalLM.from_pretrained(config.model.path)
    add_adapters(config, model)
    return {name: p.detach() for name, p in model.named_parameters()}


def data_of(config):
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    return [load_client_data(config, tokenizer, client) for client in range(CLIENTS)]


def reference(config, adapters, matrix, noise: Noise | None = None) -> list[dict[str, np.ndarray]]:
    """Final A and B of every client, by name."""
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float64)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    start = drawn(config)
    names = [name for adapter in adapters for name in (adapter.a, adapter.b)]
    shapes = [start[name].shape for name in names]
    sizes = [shape.numel() for shape in shapes]
    scale = config.lora.alpha / config.lora.rank
    steps = batches_of(config)
    off = noise.weights if noise is not None else lambda values: values

    def gradient(client: int, x: np.ndarray) -> np.ndarray:
        flat = torch.tensor(off(x), requires_grad=True)
        parts = {n: v.view(s) for n, v, s in zip(names, flat.split(sizes), shapes, strict=True)}
        held = {name: torch.from_numpy(off(values.numpy())) for name, values in weights.items()}
        merged = held | {a.weight: held[a.weight] + scale * parts[a.b] @ parts[a.a] for a in adapters}
        batch = next(steps[client])
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        logits = torch.func.functional_call(model, merged, kwargs=inputs).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100).backward()
        return flat.grad.numpy() / max(1.0, float(flat.grad.norm()))

    theta = np.tile(np.concatenate([start[name].double().numpy().ravel() for name in names]), (CLIENTS, 1))
    c, o = config.algorithm, config.optimizer
    ended = activation(
        Coefficients("dec-lora", a1=c.a1, a2=c.a2, eps=c.eps), theta, gradient, cycle([matrix]),
        every=config.gossip.every, rates=[o.lr] * STEPS, decay=o.weight_decay, noise=noise,
    )  # fmt: skip
    cuts = np.cumsum(sizes)[:-1]
    return [
        {n: v.reshape(s) for n, v, s in zip(names, np.split(client.x, cuts), shapes, strict=True)} for client in ended
    ]


@pytest.fixture(scope="module")
def references(runs) -> list[list[dict[str, np.ndarray]]]:
    """Exact, and with noise (rounding.py)."""
    (matrix, *_), arguments, _, _ = runs
    config, _, _, adapters = opened(arguments)
    return [reference(config, adapters, matrix, noise) for noise in (None, Noise())]


def last_line(path: Path) -> dict:
    return json.loads(path.read_text().splitlines()[-1])


def test_adapters_start_alike_on_every_client_and_any_number_of_ranks(runs):
    _, _, untrained, _ = runs
    config, _, saved, adapters = opened(untrained)
    start = drawn(config)
    assert sorted(saved.names) == sorted(start)
    for client in range(CLIENTS):
        for name in saved.names:
            assert torch.equal(saved.read(name, client), start[name]), name
    for adapter in adapters:
        a, b = start[adapter.a], start[adapter.b]
        assert 0.5 < a.abs().max() * a.shape[1] ** 0.5 <= 1
        assert not b.any()
    assert len({start[adapter.a].flatten()[0].item() for adapter in adapters}) == len(adapters)


def test_clients_equal_the_dense_reference_and_the_base_never_moves(runs, references):
    (matrix, _, _, layers, _), arguments, _, _ = runs
    config, _, saved, adapters = opened(arguments)
    base = dict(AutoModelForCausalLM.from_pretrained(config.model.path).named_parameters())
    adapted = [n for n in base if n.removesuffix(".weight").rpartition(".")[2] in layers]
    assert [adapter.weight for adapter in adapters] == adapted
    stored = {held: name for adapter in adapters for name, held in adapter.renamed.items()}
    start = drawn(config)
    expected, noisy = references
    assert_close(
        [{name: saved.read(name, i) for name in expected[0]} for i in range(CLIENTS)], expected, noisy, start, ""
    )
    for client in range(CLIENTS):
        for name in saved.names:
            got = saved.read(name, client)
            if name in expected[client]:
                assert not torch.allclose(got, start[name], atol=1e-4), f"{name} was never trained"
            else:
                assert torch.equal(got, base[stored.get(name, name)]), f"{name} changed"
    assert any(not np.allclose(expected[0][a.b], expected[1][a.b], atol=1e-5) for a in adapters) == (matrix is STAR)


def test_only_adapters_travel(runs):
    (_, averagings, neighbours, _, _), arguments, _, _ = runs
    _, run, saved, adapters = opened(arguments)
    numel = sum(saved.read(name, 0).numel() for adapter in adapters for name in (adapter.a, adapter.b))
    for client, count in enumerate(neighbours):
        sent = last_line(run / f"metrics/client_{client:03d}.jsonl")["gossip_bytes_sent"]
        assert sent == averagings * count * 4 * numel


def test_exports_are_merged_plain_models(runs, references, tmp_path):
    _, arguments, _, _ = runs
    config, run, _, adapters = opened(arguments)
    base = AutoModelForCausalLM.from_pretrained(config.model.path).named_parameters()
    plain = {name: p.detach().double().numpy() for name, p in base}
    exact, noisy = references
    mean = lambda clients: {name: np.mean([client[name] for client in clients], axis=0) for name in clients[0]}  # noqa: E731
    for client, expected, other in ((1, exact[1], noisy[1]), (None, mean(exact), mean(noisy))):
        report = export_model(run, tmp_path / f"out{client}", client=client)
        assert report.source == ("mean of 3 clients" if client is None else "client 1") + ", adapters merged"
        assert not (tmp_path / f"out{client}" / ADAPTERS).exists()
        model = AutoModelForCausalLM.from_pretrained(tmp_path / f"out{client}")
        merged, with_noise = (
            plain
            | {a.weight: plain[a.weight] + config.lora.alpha / config.lora.rank * x[a.b] @ x[a.a] for a in adapters}
            for x in (expected, other)
        )
        parameters = dict(model.named_parameters())
        assert parameters.keys() == merged.keys()
        for name, values in merged.items():
            tolerance = MARGIN * np.abs(with_noise[name] - values).max() + 2 * UNIT * np.abs(values).max()
            np.testing.assert_allclose(parameters[name].detach().double().numpy(), values, rtol=0, atol=tolerance)

    # `model` is the mean model: what the run scored as such
    score, examples = 0.0, 0
    for data in data_of(config):
        rows = data.own_evaluation
        (batch,) = evaluation_batches(rows, batch_size=len(rows), rank=0, ranks=1, pad_id=0)
        with torch.no_grad():
            losses, _, mask = token_scores(model.eval(), batch, torch.device("cpu"))
        score += float(losses.sum() / mask.sum()) * len(rows)
        examples += len(rows)
    assert last_line(run / "metrics/job.jsonl")["mean"]["loss"] == pytest.approx(score / examples, rel=1e-5)


def test_in_bfloat16_adapters_train_as_float32_masters_with_dropout_and_checkpointing(runs, tmp_path):
    *_, arguments = runs
    config, run, saved, adapters = opened(arguments)
    start = drawn(config)
    assert {saved.model_dtype(name) for name in saved.names} == {torch.bfloat16}
    trained = {name for a in adapters for name in (a.a, a.b)}
    assert {name for name in saved.names if saved.dtype(name) == torch.float32} == trained  # masters
    assert all(not torch.equal(rounded(saved.read(a.a, 0)), start[a.a].bfloat16()) for a in adapters)
    export_model(run, tmp_path / "out", client=0, dtype="float32")
    parameters = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    for a in adapters:
        w, b, low = (saved.read(name, 0).float() for name in (a.renamed[a.weight], a.b, a.a))
        torch.testing.assert_close(parameters[a.weight].detach(), w + a.scale * b @ low, rtol=0, atol=1e-6)

"""What becomes of a bfloat16 model's masters, against float32 and against rounding, in real runs of two rounds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from jobs import launch, word_job
from safetensors.torch import load_file

from deca_ds.checkpoint.export import export_model
from deca_ds.checkpoint.shards import ShardedModel
from deca_ds.engine.masters import rounded

pytestmark = pytest.mark.multiprocess

HALF = {"model.dtype": "bfloat16"}
RUNS = {
    "float32": {},
    "exact": HALF | {"checkpoint.every": 2, "checkpoint.keep": 20},
    "kept": HALF,
    "rounded": HALF | {"model.masters": "rounded"},
    "adapters": HALF | {"algorithm.method": "dec-lora", "blocks.layers_per_block": "null", "lora.rank": 2},
    "random": HALF | {"model.init": "random", "optimizer.lr": 0.0, "algorithm.rounds": 1, "algorithm.inner_steps": 1},
}


@pytest.fixture(scope="module")
def runs(tiny_model, word_files, tmp_path_factory) -> dict[str, Path]:
    """Clients of two ranks and of one, at a learning rate at which a norm's weight moves by less than half a place."""
    folder = tmp_path_factory.mktemp("masters")
    layout = {"cluster.clients": 2, "cluster.ranks": "[2,1]", "evaluation.max_examples": 4}
    short = {"algorithm.rounds": 2, "algorithm.inner_steps": 3, "optimizer.lr": 5e-5}
    jobs = [
        word_job(tiny_model, word_files[:2], **layout, **short | keys, **{"run.output": folder / name})
        for name, keys in RUNS.items()
    ]
    (folder / "runs.json").write_text(json.dumps(jobs))
    finished = launch("mpirun", 3, [str(folder / "runs.json")], script="tests/integration/masters_worker.py")
    assert finished.code == 0, finished.output[-4000:]
    assert "opened again with the masters held aside" in finished.output
    return {name: folder / name for name in RUNS}


def norms(run: Path) -> dict[str, torch.Tensor]:
    saved = ShardedModel(run / "model")
    return {name: saved.read(name, 0).float() for name in saved.names if "norm" in name}


def test_norm_weights_move_as_in_float32(runs):
    exact, wide, dropped = (norms(runs[name]) for name in ("exact", "float32", "rounded"))
    assert len(exact) == 7
    for name, values in exact.items():
        # a sum of bfloat16 gradients may be zero, which of them is the processor's choice
        assert (values != 1).float().mean() > 0.9 and (dropped[name] == 1).all(), name
        assert (values - 1).abs().max() < 2**-9  # which no bfloat16 next to 1 can tell
        moved = torch.nn.functional.cosine_similarity(values - 1, wide[name] - 1, dim=0)
        assert moved > 0.9, name


@pytest.mark.parametrize("client", [0, 1])
def test_masters_are_to_the_bit_those_of_a_run_that_never_drops_them(runs, client):
    exact, kept = (ShardedModel(runs[name] / "model") for name in ("exact", "kept"))
    assert exact.names == kept.names
    for name in exact.names:
        assert torch.equal(exact.read(name, client), kept.read(name, client)), name


@pytest.mark.parametrize("client", [0, None])
def test_the_export_in_float32_has_the_masters_and_the_default_the_model(runs, tmp_path, client):
    saved = ShardedModel(runs["exact"] / "model")
    export_model(runs["exact"], tmp_path / "model", client=client)
    export_model(runs["exact"], tmp_path / "wide", client=client, dtype="float32")
    model, wide = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "wide"))
    for name, masters in wide.items():
        expected = saved.mean(name) if client is None else saved.read(name, client)
        assert masters.dtype == torch.float32 and torch.equal(masters, expected)
        assert model[name].dtype == torch.bfloat16 and torch.equal(model[name], rounded(masters))
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("step", [2, 4])
def test_a_checkpoint_within_an_activation_is_exported_in_the_models_type_too(runs, tmp_path, step):
    """There the active block's state has the masters themselves; after 2 steps its parameters come first."""
    saved = ShardedModel(runs["exact"] / "checkpoints" / f"step_{step:08d}", model_only=True)
    export_model(runs["exact"], tmp_path / "model", checkpoint=step)
    for name, values in load_file(tmp_path / "model" / "model.safetensors").items():
        assert values.dtype == torch.bfloat16 and torch.equal(values, rounded(saved.mean(name))), name
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"


def test_only_what_trains_has_masters(runs):
    saved = ShardedModel(runs["adapters"] / "model")
    for name in saved.names:
        stored = torch.float32 if "lora" in name else torch.bfloat16
        assert (saved.dtype(name), saved.model_dtype(name)) == (stored, torch.bfloat16), name
    b = next(name for name in saved.names if "lora_B" in name)
    assert not torch.equal(saved.read(b, 0), saved.read(b, 0).bfloat16().float())
    assert {ShardedModel(runs["rounded"] / "model").dtype(name) for name in norms(runs["exact"])} == {torch.bfloat16}


def test_masters_of_what_was_loaded_or_drawn_are_the_models_values(runs):
    """The run never changed them; no rank count and no type of a drawn value's own stands behind them."""
    saved = ShardedModel(runs["random"] / "model")
    for name in saved.names:
        first = saved.read(name, 0)
        assert torch.equal(first, saved.read(name, 1)) and torch.equal(first, first.bfloat16().float()), name

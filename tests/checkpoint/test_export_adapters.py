"""Export of models with adapters: plain models that compute what the adapted ones computed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from saved_states import CONFIGS, load_exported, model_state, save_clients
from transformers import AutoModelForCausalLM

from deca_ds.checkpoint.adapters import save_adapters
from deca_ds.checkpoint.export import export_model
from deca_ds.config import load_config
from deca_ds.engine.adapters import add_adapters, find_adapters
from deca_ds.errors import CheckpointError
from deca_ds.run_folder import ADAPTERS

DEC_LORA = ["model.path=x", "algorithm.method=dec-lora", "blocks.layers_per_block=null"]
IDS = torch.arange(3, 21).view(2, 9)


@pytest.fixture
def make_adapted(tmp_path: Path, make_run):
    """make_adapted(architecture) -> (run folder, two clients' adapted models of one base)."""

    def make(architecture: str, *, dtype: torch.dtype = torch.float32):
        config = load_config(None, [*DEC_LORA, "lora.rank=3", "lora.alpha=4"])
        run, (model, _) = make_run(architecture, clients=2, dtype=dtype)
        model.save_pretrained(tmp_path / "base")
        adapted = [AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype).eval() for _ in range(2)]
        for client, model in enumerate(adapted):
            add_adapters(config, model)
            torch.manual_seed(client)
            for adapter in find_adapters(model):
                for name in (adapter.a, adapter.b):
                    torch.nn.init.normal_(model.get_parameter(name), std=0.1)
        shutil.rmtree(run / "model")
        save_clients(run / "model", [model_state(model) for model in adapted], ranks=3)
        save_adapters(run, find_adapters(adapted[0]))
        return run, adapted

    return make


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_client_computes_what_it_computed_with_adapters(tmp_path, make_adapted, architecture):
    run, adapted = make_adapted(architecture)
    export_model(run, tmp_path / "out", client=1, max_shard_bytes=10_000)
    exported, base = load_exported(tmp_path / "out"), load_exported(tmp_path / "base")
    assert [name for name, _ in exported.named_parameters()] == [name for name, _ in base.named_parameters()]
    expected = logits(adapted[1])
    torch.testing.assert_close(logits(exported), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    merged = {adapter.weight for adapter in find_adapters(adapted[1])}
    for name, parameter in exported.named_parameters():
        assert torch.equal(parameter, base.get_parameter(name)) == (name not in merged), name


def test_the_mean_averages_a_and_b_apart(tmp_path, make_adapted):
    run, (first, second) = make_adapted("gpt2_tied")
    export_model(run, tmp_path / "out")
    with torch.no_grad():
        for name, parameter in first.named_parameters():
            parameter.add_(second.get_parameter(name)).div_(2)
    expected = logits(first)
    torch.testing.assert_close(logits(load_exported(tmp_path / "out")), expected, rtol=1e-4, atol=1e-4)


def test_stored_bfloat16_is_merged_in_float32(tmp_path, make_adapted):
    run, (model, _) = make_adapted("llama", dtype=torch.bfloat16)
    wide, stored = (export_model(run, tmp_path / d, client=0, dtype=d).output for d in ("float32", "bfloat16"))
    assert export_model(run, tmp_path / "out", client=0).bytes == sum(
        f.stat().st_size for f in stored.glob("*.safete*")
    )
    for a in find_adapters(model):
        w, low, b = (model.get_parameter(name).float() for name in (a.renamed[a.weight], a.a, a.b))
        exact = w + a.scale * b @ low
        torch.testing.assert_close(load_exported(wide).get_parameter(a.weight), exact, rtol=0, atol=1e-6)
        assert torch.equal(
            load_exported(stored).get_parameter(a.weight), load_exported(wide).get_parameter(a.weight).bfloat16()
        )


def test_a_client_that_diverged_is_named(tmp_path, make_adapted):
    run, (model, other) = make_adapted("llama")
    shutil.rmtree(run / "model")
    adapter = find_adapters(other)[2]
    other.get_parameter(adapter.b).data[1, 1] = torch.nan
    save_clients(run / "model", [model_state(model), model_state(other)], ranks=2)
    with pytest.raises(CheckpointError, match=rf"{adapter.weight}.*NaN[\s\S]*adapters merged; not finite in client 1"):
        export_model(run, tmp_path / "out")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda entries: entries[0].update(b="nowhere"), "the saved model has no nowhere"),
        (lambda entries: entries[1].update(renamed={}), "adapters.json leaves out .*k_proj.weight"),
        (
            lambda entries: entries[0].update(a=entries[-1]["a"]),
            r"the adapter of .*q_proj.weight \(32, 32\) has shapes",
        ),
        (lambda entries: entries[0].pop("scale"), "damaged list of adapters.*scale"),
        (lambda entries: entries.pop(), "not known"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(tmp_path, make_adapted, damage, message):
    run, _ = make_adapted("llama")
    entries = json.loads((run / ADAPTERS).read_text())
    damage(entries)
    (run / ADAPTERS).write_text(json.dumps(entries))
    with pytest.raises(CheckpointError, match=message):
        export_model(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()

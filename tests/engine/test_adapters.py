"""Which layers get adapters, and what is refused."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

from deca_ds.config import load_config
from deca_ds.engine.adapters import add_adapters, find_adapters
from deca_ds.engine.architecture import find_blocks, meta_model
from deca_ds.errors import ConfigError, ModelError
from deca_ds.tools.plan import print_plan
from deca_ds.training.chosen_method import check_method

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GPT2 = GPT2Config(n_embd=24, n_head=4, n_layer=2, vocab_size=51, bos_token_id=1, eos_token_id=2)


def dec_lora(path, *overrides: str):
    return load_config(
        None, [f"model.path={path}", "algorithm.method=dec-lora", "blocks.layers_per_block=null", *overrides]
    )


@pytest.mark.parametrize(
    ("targets", "layers", "ends"),
    [
        ("[]", range(3), LINEAR),
        ("[v_proj,mlp.up_proj]", range(3), ["v_proj", "up_proj"]),
        ("[model.layers.1.self_attn.q_proj]", [1], ["q_proj"]),
        ("[down_proj,down_proj,lm_head]", range(3), ["down_proj"]),
    ],
)
def test_adapters_go_to_the_named_layers_or_to_all_linear_ones(tiny_model, targets, layers, ends):
    config = dec_lora(tiny_model, f"lora.target_modules={targets}", "lora.rank=2", "lora.alpha=3")
    model = meta_model(config.model, AutoConfig.from_pretrained(tiny_model))
    plain = {name: tuple(p.shape) for name, p in model.named_parameters()}
    add_adapters(config, model)
    adapters = find_adapters(model)
    expected = [f"model.layers.{i}.{'self_attn' if e in LINEAR[:4] else 'mlp'}.{e}" for i in layers for e in ends]
    expected += ["lm_head"] if "lm_head" in targets else []
    assert [adapter.weight for adapter in adapters] == [f"{name}.weight" for name in expected]
    assert {(adapter.scale, adapter.transposed) for adapter in adapters} == {(1.5, False)}
    plan = find_blocks(config, model)
    (block,) = plan.blocks
    assert block.label == "adapters"
    assert block.numel == sum(2 * sum(plain[adapter.weight]) for adapter in adapters)
    renamed = {held: name for adapter in adapters for name, held in adapter.renamed.items()}
    assert [renamed.get(name, name) for name in plan.frozen] == list(plain)


def test_gpt2_has_transposed_weights_and_its_own_layers_only():
    config = dec_lora("x")
    model = AutoModelForCausalLM.from_config(GPT2)
    add_adapters(config, model)
    adapters = find_adapters(model)
    assert {a.weight.split(".", 3)[3] for a in adapters} == {
        "attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight",
    }  # fmt: skip
    assert all(a.transposed for a in adapters)
    assert model.get_parameter(adapters[0].a).shape == (8, 24)
    assert model.get_parameter(adapters[0].b).shape == (72, 8)


def test_adapters_are_drawn_from_the_seed_alone(tiny_model):
    def draw(seed: int):
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
        torch.manual_seed(torch.seed())
        add_adapters(dec_lora(tiny_model, f"run.seed={seed}"), model)
        return torch.cat([model.get_parameter(adapter.a).flatten() for adapter in find_adapters(model)])

    assert draw(1).dtype == torch.bfloat16
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_other_methods_get_no_adapters(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    before = [name for name, _ in model.named_parameters()]
    add_adapters(load_config(None, [f"model.path={tiny_model}"]), model)
    assert [name for name, _ in model.named_parameters()] == before


def test_a_module_that_is_not_there_is_named_with_those_that_are(tiny_model):
    for target in ("query", "proj", "embed_tokens", "layers.1"):
        with pytest.raises(ModelError, match=rf"no linear layer '{target}'") as caught:
            add_adapters(
                dec_lora(tiny_model, f"lora.target_modules=[q_proj,{target}]"),
                AutoModelForCausalLM.from_pretrained(tiny_model),
            )
        assert caught.value.where == "lora.target_modules"
        assert ", ".join(LINEAR) in caught.value.fix


def test_a_tied_weight_is_refused():
    with pytest.raises(ModelError, match=r"lm_head shares its weight with transformer.wte.weight"):
        add_adapters(dec_lora("x", "lora.target_modules=[lm_head]"), AutoModelForCausalLM.from_config(GPT2))


def test_without_peft_the_extra_is_named(tiny_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"algorithm.method[\s\S]*\.\[lora\]"):
        check_method(dec_lora(tiny_model))
    with pytest.raises(ConfigError, match="peft"):
        add_adapters(dec_lora(tiny_model), AutoModelForCausalLM.from_pretrained(tiny_model))


def test_adapters_are_one_block(tiny_model):
    with pytest.raises(ConfigError, match=r"trains all adapters at once, but blocks.layers_per_block = 2"):
        check_method(dec_lora(tiny_model, "blocks.layers_per_block=2"))


@pytest.mark.parametrize(("key", "value"), [("rank", 0), ("alpha", 0), ("dropout", 1), ("dropout", -0.1)])
def test_a_value_out_of_range_is_refused_by_its_key(tiny_model, key, value):
    with pytest.raises(ConfigError, match=rf"lora.{key} = .* is out of range"):
        dec_lora(tiny_model, f"lora.{key}={value}")


def test_plan_shows_the_adapters_as_the_only_block(tiny_model, word_files, tmp_path, capsys):
    data = f"data.per_client=[{','.join(map(str, word_files))}]"
    print_plan(dec_lora(tiny_model, data, "cluster.clients=3", f"run.output={tmp_path / 'run'}", "lora.rank=2"))
    shown = capsys.readouterr().out
    assert "adapters" in shown
    assert "4 rounds x 1 block x 48 inner steps" in shown

"""Weight files against the model: every kind of disagreement is named, and what plain transformers loads passes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen3_5TextConfig,
)

from deca_ds.config.schema import ModelConfig
from deca_ds.engine.architecture import load_architecture
from deca_ds.engine.weight_files import given_weights
from deca_ds.errors import ModelError

SIZES = dict(vocab_size=40, hidden_size=16, intermediate_size=12, num_attention_heads=2, num_hidden_layers=2)
LLAMA = LlamaConfig(**SIZES)
TIED = LlamaConfig(**SIZES, tie_word_embeddings=True)
MIXTRAL = MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=3)
DEEPSEEK = DeepseekV3Config(
    **SIZES, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, first_k_dense_replace=1,
    kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4, n_group=2, topk_group=1,
)  # fmt: skip
QWEN_NEXT = Qwen3_5TextConfig(
    **SIZES, num_key_value_heads=2, head_dim=8, layer_types=["full_attention", "linear_attention"],
    linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
)  # fmt: skip
GPT2 = GPT2Config(vocab_size=40, n_embd=16, n_head=2, n_layer=2, n_positions=32)


def save(folder, config, change=lambda weights: weights, **options):
    """A random model of `config` in `folder`, its weights changed by `change`."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.add_(0.1)
    model.save_pretrained(folder, **options)
    weights = load_file(folder / "model.safetensors")
    changed = change(dict(weights)) or {}
    if changed.keys() != weights.keys() or any(changed[name] is not weights[name] for name in weights):
        save_file(
            {name: value.clone() for name, value in changed.items()},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
    return folder


def match(folder, **options):
    """The given weights and architecture of a folder."""
    model = ModelConfig(path=str(folder), **options)
    architecture = load_architecture(model)
    return given_weights(model, architecture), architecture


def whole(parameter):
    return 0, parameter.numel(), parameter.data.view(-1)


def compare(folder, **options):
    """Match the files, and compare them with what plain transformers loads."""
    given, architecture = match(folder, **options)
    dtype = getattr(torch, options.get("dtype", "float32"))
    model = AutoModelForCausalLM.from_pretrained(folder, config=architecture, dtype=dtype)
    given.compare(model, whole)
    return given, model


def without(*names):
    return lambda weights: {name: value for name, value in weights.items() if name not in names}


def renamed(rule):
    return lambda weights: {rule(name): value for name, value in weights.items()}


def changed(name, value):
    return lambda weights: weights | {name: value(weights[name].clone())}


def put(place, number):
    """Puts `number` at `place` of the flat tensor."""

    def change(value):
        value.view(-1)[place] = number
        return value

    return change


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "config", [LLAMA, TIED, MIXTRAL, DEEPSEEK, QWEN_NEXT, GPT2, GPTNeoXConfig(**SIZES)], ids=lambda c: c.model_type
)
def test_what_plain_transformers_loads_passes(tmp_path, config, dtype):
    given, model = compare(save(tmp_path / "m", config), dtype=dtype)
    assert given.notes == []
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=getattr(torch, dtype))
    held = model.state_dict()
    for name, value in again.state_dict().items():  # buffers have been set by the comparison
        assert held[name].dtype == value.dtype and torch.equal(held[name], value), name


def test_a_file_that_was_saved_in_parts_or_with_pickle_passes(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save(tmp_path / "whole", MIXTRAL))
    model.save_pretrained(tmp_path / "parts", max_shard_size=8_000)
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    compare(tmp_path / "parts")
    old = save(tmp_path / "old", TIED)
    state = AutoModelForCausalLM.from_pretrained(old).state_dict()  # both names of the tied weight
    (old / "model.safetensors").unlink()
    torch.save(state, old / "pytorch_model.bin")
    compare(old)
    save(old, TIED)
    given, _ = match(old)
    assert given.notes == ["weights are read from model.safetensors, not from pytorch_model.bin"]
    (old / "model.safetensors").unlink()
    first, second = (dict(list(state.items())[half::2]) for half in (0, 1))
    (old / "pytorch_model.bin").unlink()
    index = {}
    for name, part in (("a.bin", first), ("b.bin", second)):
        torch.save(part, old / name)
        index |= dict.fromkeys(part, name)
    (old / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    compare(old)


def test_names_of_the_model_without_its_head_pass(tmp_path):
    compare(save(tmp_path / "tied", TIED, renamed(lambda name: name.removeprefix("model."))))
    compare(save(tmp_path / "gpt2", GPT2, renamed(lambda name: name.removeprefix("transformer."))))


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (LLAMA, without("model.layers.1.mlp.up_proj.weight"), r"1 missing keys: model\.layers\.1\.mlp\.up_proj"),
        (LLAMA, without("lm_head.weight"), r"missing keys: lm_head\.weight[\s\S]*tie_word_embeddings: true"),
        (TIED, without("model.embed_tokens.weight"), r"missing keys: model\.embed_tokens\.weight, lm_head"),
        (DEEPSEEK, without("model.layers.1.mlp.gate.e_score_correction_bias"), "missing keys: .*e_score_correction"),
        (LLAMA, lambda w: w | {"value.weight": torch.ones(2)}, r"no place in LlamaForCausalLM: value\.weight"),
        (LLAMA, renamed(lambda n: f"module.{n}"), r"no place in Llama.*: module\.lm_head[\s\S]*remove 'module.'"),
        (
            GPT2,
            renamed(lambda n: n.replace("ln_f.weight", "ln_f.gamma")),
            r"1 weights have no .*ln_f\.gamma; and the model lacks transformer\.ln_f\.weight[\s\S]*rename them",
        ),
        (GPT2, lambda w: w | {"transformer.h.0.other.bias": torch.ones(4, 4)}, r"no place in .*other\.bias"),
        (GPT2, lambda w: w | {"transformer.h.0.masked_bias": torch.ones(2)}, r"no place in .*masked_bias"),
        (LLAMA, lambda w: w | {n.replace("layers.1", "layers.2"): v for n, v in w.items()}, "9 weights have no"),
        (LLAMA, changed("model.norm.weight", lambda v: v[:5].clone()), r"mismatched shapes: model\.norm.* \(5,\).*16"),
        (MIXTRAL, without("model.layers.0.block_sparse_moe.experts.1.w1.weight"), r"layers\.0.*experts|do not make"),
        (LLAMA, lambda w: w | {"norm.weight": w["model.norm.weight"]}, r"norm\.weight are the same parameter"),
        (LLAMA, changed("model.norm.weight", lambda v: v.to(torch.float8_e4m3fn)), r"quantised weights: .*float8"),
        (LLAMA, changed("lm_head.weight", lambda v: v.to(torch.int8)), r"quantised weights: lm_head\.weight"),
    ],
)  # fmt: skip
def test_names_and_shapes_that_disagree_are_refused_before_loading(tmp_path, config, change, message):
    with pytest.raises(ModelError, match=message):
        match(save(tmp_path / "m", config, change))


@pytest.mark.parametrize(
    ("config", "name", "place", "number"),
    [
        (LLAMA, "model.layers.1.mlp.up_proj.weight", 77, float("nan")),
        (TIED, "model.embed_tokens.weight", -1, float("inf")),
        (MIXTRAL, "model.layers.1.block_sparse_moe.experts.2.w3.weight", 5, float("-inf")),
        (DEEPSEEK, "model.layers.1.mlp.gate.e_score_correction_bias", 0, float("nan")),
    ],
)
def test_weights_that_are_not_finite_are_refused_by_their_name(tmp_path, config, name, place, number):
    with pytest.raises(ModelError, match=rf"NaN or infinite values in {name}\n"):
        compare(save(tmp_path / "m", config, changed(name, put(place, number))))


def test_a_weight_that_overflows_the_data_type_is_refused(tmp_path):
    folder = save(tmp_path / "m", LLAMA, changed("model.norm.weight", put(3, 3.4e38)))
    compare(folder)
    with pytest.raises(ModelError, match=r"infinite values in model\.norm\.weight"):
        compare(folder, dtype="bfloat16")


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.experts.down_proj", "model.norm.weight"])
def test_one_changed_element_of_the_loaded_model_is_found(tmp_path, name):
    folder = save(tmp_path / "m", MIXTRAL)
    given, _ = match(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] += 1e-6
    with pytest.raises(ModelError, match=rf"{name}: not what the files hold"):
        given.compare(model, whole)


def test_a_head_that_differs_from_the_embedding_unties_them(tmp_path):
    folder = save(tmp_path / "m", TIED, lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"] + 1})
    given, architecture = match(folder)
    assert not architecture.tie_word_embeddings
    (note,) = given.notes
    assert "model.embed_tokens.weight and lm_head.weight" in note and "two parameters" in note
    given, model = compare(folder)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight + 1)


def test_a_head_alone_is_the_embedding_too(tmp_path):
    folder = save(tmp_path / "m", TIED, renamed(lambda n: n.replace("model.embed_tokens", "lm_head")))
    assert "lm_head.weight" in load_file(folder / "model.safetensors")
    _, model = compare(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_what_a_class_leaves_out_is_told(tmp_path):
    extra = {"mtp.layers.0.norm.weight": torch.ones(16), "model.visual.patch.weight": torch.ones(3)}
    given, _ = compare(save(tmp_path / "m", QWEN_NEXT, lambda w: w | extra))
    (note,) = given.notes
    assert note.startswith("2 weights in the files are left out") and "mtp.layers.0.norm.weight" in note
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in (0, 1)}
    given, _ = compare(save(tmp_path / "old", LLAMA, lambda w: w | old))
    assert "rotary_emb.inv_freq" in given.notes[0]


@pytest.mark.parametrize(
    ("name", "attention"), [("gpt_neo", "attn.attention"), ("gptj", "attn"), ("codegen", "attn"), ("gpt2", "attn")]
)
def test_masks_that_older_versions_saved_are_left_out(tmp_path, name, attention):
    """Published models of these kinds hold them; their classes have no buffer of that name any more."""
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    names = {"bias": mask, "causal_mask": mask, "masked_bias": torch.tensor(-1e9)}
    old = {f"transformer.h.{i}.{attention}.{part}": value for i in (0, 1) for part, value in names.items()}
    given, _ = compare(save(tmp_path / "m", CONFIGS[name](), lambda weights: weights | old))
    (note,) = given.notes
    assert note.startswith("6 weights in the files are left out") and "masked_bias" in note


def test_an_adapter_alone_and_damaged_files_are_refused(tmp_path):
    folder = save(tmp_path / "m", LLAMA)
    whole_file = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole_file[:-100])
    with pytest.raises(ModelError, match=r"cannot read .*model\.safetensors"):
        match(folder)
    (folder / "model.safetensors").unlink()
    for content in (b"not a model", b""):
        (folder / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(ModelError, match=r"cannot read .*pytorch_model\.bin: ."):
            match(folder)
    torch.save([1], folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin holds a list"):
        match(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match="cannot load"):
        match(folder)
    index = folder / "model.safetensors.index.json"
    for content in ("{", "{}", "[]"):
        index.write_text(content)
        with pytest.raises(ModelError, match="cannot load"):
            match(folder)
    index.unlink()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds an adapter"):
        match(folder)

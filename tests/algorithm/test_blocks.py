"""Blocks of real architectures, built without memory from tiny configurations or the default ones."""

import pytest
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
)
from transformers.initialization import no_init_weights

from deca_ds.algorithm.blocks import (
    Block,
    BlockPlan,
    find_layers,
    fused_parameters,
    parameter_shapes,
    split_into_blocks,
)

SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=5)
ARCHITECTURES = {
    "llama": (LlamaConfig(**SMALL), "model.layers", True),
    "llama tied": (LlamaConfig(**SMALL, tie_word_embeddings=True), "model.layers", False),
    "qwen2": (Qwen2Config(**SMALL, num_key_value_heads=2, tie_word_embeddings=True), "model.layers", False),
    "gpt2": (GPT2Config(vocab_size=64, n_embd=32, n_head=4, n_layer=5), "transformer.h", False),
    "gpt-neox": (GPTNeoXConfig(**SMALL), "gpt_neox.layers", True),
    "mixtral": (MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4), "model.layers", True),
}


def build(config):
    with init_empty_weights(), no_init_weights():
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return model


@pytest.fixture(params=ARCHITECTURES, scope="module")
def architecture(request):
    config, layers, own_head = ARCHITECTURES[request.param]
    return build(config), layers, own_head


def names(model):
    return {name for name, _ in model.named_parameters()}


def test_fused_experts_are_found_in_models_that_have_them_and_in_no_other(architecture):
    fused = fused_parameters(architecture[0])
    assert all(name in names(architecture[0]) and ".experts." in name for name in fused)
    assert len(fused) == (2 * SMALL["num_hidden_layers"] if "Mixtral" in type(architecture[0]).__name__ else 0)


def test_kernels_of_convolutions_and_what_images_need_are_no_experts():
    assert fused_parameters(nn.Sequential(nn.Conv1d(4, 4, 3), nn.Linear(4, 4))) == []
    model = build(AutoConfig.for_model("gemma3"))  # its vision tower pools by a parameter of three dimensions
    assert fused_parameters(model, split_into_blocks(model, layers_per_block=1, outside="own").beside) == []
    assert fused_parameters(model) == ["model.vision_tower.head.probe"]


@pytest.mark.parametrize("outside", ["own", "joined", "frozen"])
@pytest.mark.parametrize("layers_per_block", [1, 2, 100])
def test_blocks_are_disjoint_and_complete(architecture, outside, layers_per_block):
    model, _, _ = architecture
    plan = split_into_blocks(model, layers_per_block=layers_per_block, outside=outside)
    listed = [name for block in plan.blocks for name in block.names] + list(plan.frozen)
    assert len(listed) == len(set(listed)) and set(listed) == names(model)
    sizes = dict(model.named_parameters())
    for block in plan.blocks:
        assert block.numel == sum(sizes[name].numel() for name in block.names) > 0


def test_layers_are_grouped_and_what_lies_outside_is_its_own_block_joined_or_frozen(architecture):
    model, layers, own_head = architecture
    plan = split_into_blocks(model, layers_per_block=2, outside="own")
    depth = layers.count(".") + 1
    in_blocks = [{n.split(".")[depth] for n in b.names if n.startswith(layers + ".")} for b in plan.blocks[1:4]]
    assert in_blocks == [{"0", "1"}, {"2", "3"}, {"4"}]
    assert plan.blocks[0].label == "embeddings" and not any(n.startswith(layers) for n in plan.blocks[0].names)
    assert len(plan.blocks) == (5 if own_head else 4)
    frozen = split_into_blocks(model, layers_per_block=2, outside="frozen")
    assert len(frozen.blocks) == 3 and not any(n.startswith(layers) for n in frozen.frozen)
    joined = split_into_blocks(model, layers_per_block=2, outside="joined")
    assert len(joined.blocks) == 3 and not joined.frozen


TEXT, NESTED = ("model.layers",), ("model.language_model.layers",)
# model type -> its lists of layers, and whether some of its parameters serve other input than text
OTHERS = {
    **dict.fromkeys(
        [
        "afmoe", "bamba", "bitnet", "cohere2", "deepseek_v2", "ernie4_5_moe", "falcon_h1", "gemma2",
        "gemma3_text", "glm4_moe", "gpt_oss", "granitemoehybrid", "jamba", "jetmoe", "kimi_linear", "lfm2",
        "minimax", "mllama", "modernbert-decoder", "nemotron_h", "olmo_hybrid", "olmoe", "phi3", "phimoe",
        "qwen3_5_text", "qwen3_next", "recurrent_gemma", "smollm3", "stablelm", "starcoder2", "zamba", "zamba2",
        ],
        (TEXT, False),
    ),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba"), (("backbone.layers",), False)),
    **dict.fromkeys(("gpt_neo", "gpt_bigcode", "falcon", "ctrl"), (("transformer.h",), False)),
    "rwkv": (("rwkv.blocks",), False),
    "mpt": (("transformer.blocks",), False),
    "opt": (("model.decoder.layers",), False),
    "bert": (("bert.encoder.layer",), False),
    "xlnet": (("transformer.layer",), False),
    # towers for images or sound beside or within the text model
    "gemma3": (NESTED, True),
    "got_ocr2": (NESTED, True),
    "moss_transcribe_diarize": (NESTED, True),
    "phi4_multimodal": (TEXT, True),
    "git": (("git.encoder.layer",), True),
    # a layer in several lists, and two stacks
    "xlm": (tuple(f"transformer.{part}" for part in ("attentions", "layer_norm1", "ffns", "layer_norm2")), False),
    "hrm_text": (("model.L_module.layers", "model.H_module.layers"), False),
}  # fmt: skip


@pytest.mark.parametrize("model_type", OTHERS)
def test_the_layers_are_where_the_parameters_are(model_type):
    lists, has_towers = OTHERS[model_type]
    model = build(AutoConfig.for_model(model_type))
    assert set(find_layers(model, parameter_shapes(model))) == set(lists)
    plan = split_into_blocks(model, layers_per_block=1, outside="own")
    listed = [name for block in plan.blocks for name in block.names] + list(plan.frozen)
    assert len(listed) == len(set(listed)) and set(listed) == names(model)
    assert plan.frozen == plan.beside and bool(plan.beside) == has_towers
    trained = [name for block in plan.blocks for name in block.names]
    towers = ("vision_tower.", "audio_tower.", "image_encoder.", "img_processor.", "audio_embed.encoder.")
    assert not any(tower in name for name in trained for tower in towers)
    assert len({block.label for block in plan.blocks}) == len(plan.blocks)
    layers = [block.numel for block in plan.blocks if block.label.startswith("layer")]
    assert len(layers) >= 4 and max(layers) <= 0.3 * sum(block.numel for block in plan.blocks)


def test_a_shared_module_belongs_to_the_first_layer_that_has_it():
    model = build(AutoConfig.for_model("zamba2"))
    plan = split_into_blocks(model, layers_per_block=1, outside="own")
    shared = {name.split(".")[2] for name in names(model) if ".shared_transformer." in name}
    hybrid = [i for i, kind in enumerate(model.config.layers_block_type) if kind == "hybrid"]
    assert shared == set(map(str, hybrid[: model.config.num_mem_blocks]))
    for name in names(model):
        if ".shared_transformer." in name:
            (block,) = [block for block in plan.blocks if name in block.names]
            assert block.label == f"layer {name.split('.')[2]}"


def test_lists_within_layers_and_small_ones_are_no_stacks():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(9))

    model = nn.Module()
    model.adapters = nn.ModuleList(nn.Linear(2, 1) for _ in range(3))
    model.layers = nn.ModuleList(Layer() for _ in range(2))
    assert find_layers(model, parameter_shapes(model)) == {"layers": 0}
    model.stages = nn.ModuleList(nn.ModuleList(Layer() for _ in range(2)) for _ in range(2))
    assert find_layers(model, parameter_shapes(model)) == {"layers": 0, "stages.0": 2, "stages.1": 4}


@pytest.mark.parametrize(
    ("sizes", "remedy"),
    [
        ({"embeddings": 60, "layers 0-1": 20, "layers 2-3": 20}, "blocks.outside=frozen"),
        ({"embeddings + layers 0-1": 80, "layers 2-3": 20}, "blocks.outside=own"),
        ({"embeddings": 10, "layers 0-7": 70, "layers 8-9 + norm": 10}, "a smaller blocks.layers_per_block"),
        (
            {"embeddings": 10, "layer 0": 100} | {f"layer {i}": 10 for i in range(1, 9)},
            "a larger blocks.layers_per_block",
        ),
    ],
)
def test_a_block_that_is_much_larger_than_the_others_is_named(sizes, remedy):
    (said,) = BlockPlan(tuple(Block(label, (label,), numel) for label, numel in sizes.items()), ()).imbalance
    largest = max(sizes, key=sizes.get)
    assert repr(largest) in said and f"{sizes[largest] / sum(sizes.values()):.0%}" in said and remedy in said


@pytest.mark.parametrize("sizes", [[100], [60, 40], [20, 10, 10, 10], [30, 10, 10, 10, 10]])
def test_blocks_that_are_about_as_large_are_no_reason_to_warn(sizes):
    assert not BlockPlan(tuple(Block(f"layer {i}", ("x",), n) for i, n in enumerate(sizes)), ()).imbalance


def test_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match="Sequential has no list"):
        split_into_blocks(nn.Sequential(nn.Linear(2, 2)), layers_per_block=1, outside="own")
    with pytest.raises(ValueError, match="at least 1, not 0"):
        split_into_blocks(nn.Sequential(nn.Linear(2, 2)), layers_per_block=0, outside="own")

"""Blocks of real architectures, built without memory from tiny configurations."""

import pytest
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, MixtralConfig, Qwen2Config

from deca_ds.algorithm.blocks import find_layers, split_into_blocks

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
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return model


@pytest.fixture(params=ARCHITECTURES, scope="module")
def architecture(request):
    config, layers, own_head = ARCHITECTURES[request.param]
    return build(config), layers, own_head


def names(model):
    return {name for name, _ in model.named_parameters()}


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


def test_structure(architecture):
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


def test_a_list_within_the_layers_does_not_win():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(9))

    model = nn.Module()
    model.layers = nn.ModuleList(Layer() for _ in range(2))
    assert find_layers(model, {n: tuple(p.shape) for n, p in model.named_parameters()}) == {"layers": 0}


def test_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match="Sequential has no list"):
        split_into_blocks(nn.Sequential(nn.Linear(2, 2)), layers_per_block=1, outside="own")
    with pytest.raises(ValueError, match="at least 1, not 0"):
        split_into_blocks(nn.Sequential(nn.Linear(2, 2)), layers_per_block=0, outside="own")

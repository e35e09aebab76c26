"""Random weights: those of each model's own rules, and the same ones however the model is made."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    NemotronHConfig,
    OpenAIGPTConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from deca_ds.engine import random_weights
from deca_ds.engine.random_weights import draw_weights, nothing_drawn
from deca_ds.errors import ModelError

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2)
GPT2 = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=64)
CONFIGS = {
    "llama": LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=True, pad_token_id=3, initializer_range=0.1),
    "gpt2": GPT2Config(**GPT2),  # scales what comes back into the residual stream
    "mamba": MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4),  # A_log, D, dt_proj
    "mixtral": MixtralConfig(**SIZES, **HEADS, num_local_experts=4),
    # its linear layers' weights are left to torch's constructor, and some of them scaled by their parents' rule
    "nemotron_h": NemotronHConfig(
        **SIZES, **HEADS, head_dim=8, mamba_num_heads=4, mamba_head_dim=8, n_groups=2, ssm_state_size=4,
        layers_block_type=["mamba", "attention"],
    ),
}  # fmt: skip


def drawn(config: PretrainedConfig, seed: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    with nothing_drawn():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.fill_(torch.nan)
    draw_weights(model, seed)
    return model


def by_the_rules(model: PreTrainedModel, seed: int) -> None:
    """What transformers does: a module after its children, each rule with everything there is in reach."""

    def apply(module: nn.Module, name: str, rule) -> None:
        for key, child in module.named_children():
            apply(child, f"{name}.{key}", child._init_weights if isinstance(child, PreTrainedModel) else rule)
        random_weights.seed_for(seed, name)
        if isinstance(module, nn.Linear):
            module.reset_parameters()  # as its constructor does
            random_weights.seed_for(seed, name)
        rule(module)

    with torch.no_grad():
        apply(model, "", model._init_weights)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_is_what_the_models_rules_make_it(name):
    model, plain = drawn(CONFIGS[name], 1), AutoModelForCausalLM.from_config(CONFIGS[name])
    head = plain.get_output_embeddings()
    if head.weight is plain.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.clone())  # or its rule would come after that of the embeddings
    by_the_rules(plain, 1)
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, plain.get_parameter(key)), key


def test_values_hang_on_seed_and_name_alone():
    state = torch.get_rng_state()
    one, other = drawn(CONFIGS["mixtral"], 0), drawn(CONFIGS["mixtral"], 1)
    torch.randn(3)
    again = drawn(CONFIGS["mixtral"], 0, torch.bfloat16)
    torch.set_rng_state(state)
    for key, parameter in one.named_parameters():
        assert torch.equal(parameter.bfloat16(), again.get_parameter(key))
        assert torch.equal(parameter, other.get_parameter(key)) == (parameter.dim() < 2)
    first, second = (one.model.layers[i].self_attn.q_proj.weight for i in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    deeper = MixtralConfig(**CONFIGS["mixtral"].to_dict() | {"num_hidden_layers": 3})
    assert torch.equal(drawn(deeper, 0).model.layers[1].self_attn.q_proj.weight, second)


def test_a_tied_head_is_the_embeddings():
    model = drawn(CONFIGS["llama"], 0)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    weight = model.lm_head.weight.detach()
    assert not weight[3].any() and float(weight[4:].std()) == pytest.approx(0.1, rel=0.1)


def test_a_matrix_that_no_rule_draws_is_named():
    with pytest.raises(ModelError, match=r"leave out weight \(32, 96\) of Conv1D[\s\S]*model.init=pretrained"):
        drawn(OpenAIGPTConfig(**GPT2), 0)

"""Models that run other modules for other data are refused where a client has several ranks, unless ZeRO-3 gathers the
module that chooses as a whole."""

from __future__ import annotations

import os

import pytest
import torch
from list_experts import ListExpertsConfig, ListExpertsForCausalLM
from tiny_models import CONFIGS
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from deca_ds.engine import internals
from deca_ds.engine.load import expert_lists
from deca_ds.engine.same_modules import check_same_modules
from deca_ds.errors import ModelError

CPU = torch.device("cpu")
SIZES = dict(vocab_size=64, hidden_size=16, intermediate_size=8, num_attention_heads=4, num_hidden_layers=2)
SOME = ("llama", "mixtral", "gemma3", "zamba2", "mamba2", "recurrent_gemma", "qwen3_next", "gpt_oss", "deepseek_v3")
REFUSED = {"dbrx": r"ffn\.experts\.mlp"}  # one module is all its experts, and is called for each that has tokens
NAMES = tuple(CONFIGS) if os.environ.get("DECA_TEST_ARCHITECTURES") == "all" else SOME


def batches():
    draw = torch.Generator().manual_seed(0)
    for length in (5, 33, 2, 9, 17):
        ids = torch.randint(4, 44, (1, length), generator=draw)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in REFUSED])
def test_models_that_run_the_same_for_all_data_pass(name):
    torch.manual_seed(0)
    check_same_modules(AutoModelForCausalLM.from_config(CONFIGS[name]()).eval(), batches(), CPU)


@pytest.mark.parametrize("name", REFUSED)
def test_a_module_that_is_called_once_for_each_choice_is_refused(name):
    torch.manual_seed(0)
    with pytest.raises(ModelError, match=rf"runs \S*{REFUSED[name]} for some data only, or more often"):
        check_same_modules(AutoModelForCausalLM.from_config(CONFIGS[name]()).eval(), batches(), CPU)


def test_experts_in_a_list_pass_only_where_their_layer_is_gathered_as_a_whole():
    torch.manual_seed(0)
    model = ListExpertsForCausalLM(ListExpertsConfig(**SIZES, initializer_range=0.5)).eval()
    with pytest.raises(ModelError, match=r"ListExpertsForCausalLM runs model\.layers\.\d\.mlp\.experts\.\d+"):
        check_same_modules(model, batches(), CPU)
    internals.keep_whole(expert_lists(model))
    check_same_modules(model, batches(), CPU)


@pytest.mark.parametrize("swaps", [False, True])
def test_layers_that_are_left_out_or_swapped_for_some_data_are_refused_by_name(swaps):
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    first, second = model.model.layers
    usual = first.forward

    def forward(hidden, *arguments, **options):
        if hidden.shape[1] > 9:
            return second.mlp(first.mlp(hidden)) if swaps else hidden
        return usual(hidden, *arguments, **options)

    first.forward = forward
    with pytest.raises(ModelError, match=r"LlamaForCausalLM runs model\.layers\.0.*[\s\S]*one rank"):
        check_same_modules(model, batches(), CPU)
    assert not any(module._forward_pre_hooks for module in model.modules())

"""Models that run other modules for other data are refused where a client has several ranks, unless ZeRO-3 gathers the
module that chooses as a whole: before training, or as soon as a row shows it."""

from __future__ import annotations

import os
import socket

import pytest
import torch
from jobs import launch
from list_experts import ListExpertsConfig, ListExpertsForCausalLM
from tiny_models import CONFIGS
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from deca_ds.engine import internals
from deca_ds.engine.architecture import expert_lists
from deca_ds.engine.same_modules import SameModules
from deca_ds.errors import ModelError

SIZES = dict(vocab_size=64, hidden_size=16, intermediate_size=8, num_attention_heads=4, num_hidden_layers=2)
SOME = ("llama", "mixtral", "gemma3", "zamba2", "mamba2", "recurrent_gemma", "qwen3_next", "gpt_oss", "deepseek_v3")
REFUSED = {
    "dbrx": r"ffn\.experts\.mlp",  # one module is all its experts, and is called for each that has tokens
    "longcat_flash": r"mlp\.experts\.act_fn",  # the same of a module without parameters
}
NAMES = tuple(CONFIGS) if os.environ.get("DECA_TEST_ARCHITECTURES") == "all" else SOME


def batches():
    draw = torch.Generator().manual_seed(0)
    for length in (5, 33, 2, 9, 17):
        ids = torch.randint(4, 44, (1, length), generator=draw)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def check(model):
    watch = SameModules(model)
    for batch in batches():
        with watch.watched("scoring"):
            model(**batch, use_cache=False)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in REFUSED])
def test_models_that_run_the_same_for_all_data_pass(name):
    torch.manual_seed(0)
    check(AutoModelForCausalLM.from_config(CONFIGS[name]()).eval())


@pytest.mark.parametrize("name", REFUSED)
def test_a_module_that_is_called_once_for_each_choice_is_refused(name):
    torch.manual_seed(0)
    with pytest.raises(ModelError, match=rf"runs \S*{REFUSED[name]} for some data only, or more often"):
        check(AutoModelForCausalLM.from_config(CONFIGS[name]()).eval())


def test_experts_in_a_list_pass_only_where_their_layer_is_gathered_as_a_whole():
    torch.manual_seed(0)
    model = ListExpertsForCausalLM(ListExpertsConfig(**SIZES, initializer_range=0.5)).eval()
    with pytest.raises(ModelError, match=r"ListExpertsForCausalLM runs model\.layers\.\d\.mlp\.experts\.\d+"):
        check(model)
    internals.keep_whole(expert_lists(model))
    check(model)


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
        check(model)


class Calls(nn.Module):
    """Calls those of its parts whose numbers it is given."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict({name: nn.Linear(2, 2) for name in "abc"} | {"d": nn.Identity()})

    def forward(self, names):
        hidden = torch.zeros(1, 2)
        for name in names:
            hidden = self.parts[name](hidden)
        return hidden


@pytest.mark.parametrize(
    ("first", "later", "named", "ran"),
    [
        ("abc", "adc", "parts.d", "a"),
        ("abc", "dabc", "parts.d", ""),
        ("abc", "ac", "parts.b", "a"),
        ("abc", "acb", "parts.b", "a"),
        ("abc", "abcc", "parts.c", "abc"),
        ("abc", "ab", "parts.c", "ab"),
        ("aab", "ab", "parts.a", "a"),
        ("ab", "aab", "parts.a", "a"),
        ("", "a", "parts.a", ""),
    ],
)
def test_a_pass_that_is_about_to_differ_from_the_first_ends_before_the_call(first, later, named, ran):
    model, called = Calls(), []
    watch = SameModules(model)
    for name, part in model.parts.items():
        part.register_forward_hook(lambda *_, name=name: called.append(name))
    for _ in range(2):
        with watch.watched("training"):
            model(first)
    with watch.watched("scoring"):  # passes of another kind
        model("ddd")
    model("cba")  # in no pass: in the backward pass a layer may run again
    called.clear()
    told = rf"Calls runs {named} for some data only, or more often or earlier: the ranks"
    with pytest.raises(ModelError, match=told), watch.watched("training"):
        model(later)
    assert "".join(called) == ran


def test_an_error_in_a_pass_is_told_as_it_is():
    watch = SameModules(model := Calls())
    for _ in range(2):
        with pytest.raises(KeyError, match="x"), watch.watched("training"):
            model("abx")
    with watch.watched("training"):
        model("abc")


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("what", "when", "named"),
    [
        ("other", 0, "other"),
        ("plain", 2, "plain"),
        ("other", 4, "other"),
        ("without", 6, "usual"),
    ],
)
def test_two_ranks_of_which_one_comes_to_run_other_modules_do_not_wait_for_each_other(what, when, named):
    """In training or scoring, in the first pass of a kind or later, with a row that is not among those tried before."""
    finished = launch("hand", 2, [f"{what}={when}"], script="tests/engine/choosing_worker.py")
    assert finished.code == 2, finished.output[-4000:]
    assert f"pass {when} is done" not in finished.output
    assert when == 0 or f"pass {when - 1} is done" in finished.output
    (told,) = [line for line in finished.output.splitlines() if line.startswith("ERROR: ")]
    assert f"rank 1 on {socket.gethostname()}, " in told and f"Model runs model.layers.1.mlp.{named} for some" in told
    assert "Traceback" not in finished.output and "give each client one rank" in finished.output

"""What passes take, found without values, against the same passes with them."""

import platform

import pytest
import tiny_models
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from deca_ds.config import load_config
from deca_ds.engine.architecture import meta_model
from deca_ds.engine.dry_pass import DryModel, NotWithoutValues
from deca_ds.engine.heap import kept_below
from deca_ds.engine.losses import has_auxiliary

ROWS, LENGTH = 3, 32


def config(*changes: str):
    return load_config(None, ["model.path=none", "run.output=none", *changes])


def kept_by_autograd(model: nn.Module, trained: list[str], rows: int) -> int:
    """Bytes of what the body of a real model leaves for the backward pass, parameters and buffers beside."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    beside = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    ids = torch.zeros(rows, LENGTH, dtype=torch.int64)
    mask = torch.ones_like(ids)
    if has_auxiliary(model):
        mask[1:, -1] = 0  # several rows have different lengths
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in beside:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.fixture(autouse=True)
def _returned(monkeypatch):
    """The C library keeps nothing of what is freed, so that a moment's memory is that of the tensors alive."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "0")


@pytest.mark.parametrize(
    ("name", "rows", "auxiliary"),
    [("llama", 1, False), ("llama", ROWS, False), ("gpt2", ROWS, False), ("mixtral", 3, False), ("mixtral", 2, True)],
)
def test_a_layer_keeps_what_autograd_saves_of_it(name, rows, auxiliary):
    architecture = tiny_models.CONFIGS[name]()
    architecture.output_router_logits = auxiliary
    dry = DryModel(config("model.dtype=bfloat16"), architecture, gpu=False)
    model = AutoModelForCausalLM.from_config(architecture, dtype=torch.bfloat16)
    layers = [[n for n, _ in model.named_parameters() if f".{k}." in n and "expert" not in n] for k in (0, 1)]
    found = [dry.training(names, rows, LENGTH).saved for names in layers]
    wanted = [kept_by_autograd(model, names, rows) for names in layers]
    assert found[0] - found[1] == pytest.approx(wanted[0] - wanted[1], rel=0.02)
    states = 4 * rows * LENGTH * architecture.hidden_size  # of those between layers a few are held beside
    assert wanted[0] <= found[0] <= wanted[0] + 4 * states


def test_a_block_keeps_what_comes_after_it_and_checkpointing_little_of_it():
    architecture = tiny_models.CONFIGS["llama"]()
    dry = DryModel(config(), architecture, gpu=False)
    of_layer = {k: [n for n in dict(meta_names(architecture)) if f"layers.{k}." in n] for k in (0, 1)}
    first, last = (dry.training(of_layer[k], ROWS, LENGTH) for k in (0, 1))
    assert first.saved > 1.5 * last.saved
    assert dry.training(of_layer[0], ROWS, LENGTH, checkpointing=True).saved < 0.5 * first.saved
    assert dry.training(of_layer[0], ROWS, LENGTH) == first  # as before


def test_the_gradients_of_a_tied_matrix_are_two_at_a_time():
    architecture = tiny_models.CONFIGS["llama, tied, biased"]()
    architecture.vocab_size = 4096  # beside whose gradient the rest is nothing
    (matrix,) = (p for n, p in meta_names(architecture) if n.endswith("embed_tokens.weight"))
    dry = DryModel(config(), architecture, gpu=False)
    found = dry.training(["model.embed_tokens.weight"], 1, 8).backward
    assert 2 * 4 * matrix.numel() <= found < 2.5 * 4 * matrix.numel()


def test_the_heads_gradient_is_made_beside_its_logits():
    architecture = tiny_models.CONFIGS["llama"]()
    architecture.vocab_size = 4096
    dry = DryModel(config("model.dtype=bfloat16"), architecture, gpu=False)
    gradient = 4 * architecture.vocab_size * architecture.hidden_size  # of the head, in float32
    trained, frozen = (dry.training([name], 1, 8).loss for name in ("lm_head.weight", "model.norm.weight"))
    assert trained - frozen == pytest.approx(gradient, rel=0.01)


def test_what_is_made_of_a_chunks_logits_is_there_at_once_on_a_gpu_alone():
    architecture = tiny_models.CONFIGS["llama"]()
    architecture.vocab_size = 2**16  # 16 positions make a piece on a CPU
    names = ["model.norm.weight"]
    near, gpu = (DryModel(config(), architecture, gpu).training(names, 1, 128) for gpu in (False, True))
    logits = 4 * architecture.vocab_size * 127
    assert near.loss < 1.6 * logits and 2.9 * logits < gpu.loss < 4.1 * logits
    assert near.backward == gpu.backward


def test_memory_of_small_tensors_stays_when_they_are_freed_and_that_of_large_ones_does_not(monkeypatch):
    architecture = tiny_models.CONFIGS["llama"]()
    architecture.vocab_size = 2**15
    names = ["model.embed_tokens.weight"]
    gradient = 4 * architecture.vocab_size * architecture.hidden_size  # made last, when activations are gone

    def passes(threshold, gpu=False):
        monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(threshold))
        return DryModel(config(), architecture, gpu).training(names, 1, 8)

    returned, some, all_of_it = passes(0), passes(gradient), passes(gradient + 1)
    assert returned.kept == 0 and returned.saved == some.saved == all_of_it.saved
    assert some.kept == max(returned.forward, returned.loss)
    assert (some.forward, some.loss, some.backward) == (some.kept, some.kept, some.kept + gradient)
    assert all_of_it.kept == max(returned.loss, returned.backward) < some.backward
    assert (all_of_it.forward, all_of_it.loss, all_of_it.backward) == (all_of_it.kept,) * 3
    assert passes(gradient, gpu=True).kept == 0, "torch's own allocator, of which the plan knows nothing"


def test_what_an_evaluation_leaves_is_told_apart_from_what_it_returns(monkeypatch):
    architecture = tiny_models.CONFIGS["llama"]()
    nothing, most = DryModel(config(), architecture, gpu=False).scoring(ROWS, LENGTH)
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**20))
    assert nothing == 0 and DryModel(config(), architecture, gpu=False).scoring(ROWS, LENGTH) == (most, 0)


def test_the_threshold_is_that_of_the_environment_or_the_highest_that_glibc_comes_to(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    for chosen, expected in {"65536": 65536, str(2**40): 2**25, "": 2**25, "64K": 2**25}.items():
        monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", chosen)
        assert kept_below() == expected
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_")
    assert kept_below() == 2**25
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert kept_below() == 0


def test_modules_are_called_in_the_order_of_the_forward_pass():
    architecture = tiny_models.CONFIGS["llama"]()
    every = DryModel(config(), architecture, gpu=False).calls
    assert every[:2] == [(), ()]  # the model and its body
    calls = [call for call in every if call]
    assert calls[0] == ("model.embed_tokens.weight",) and calls[-1] == ("lm_head.weight",)
    assert sorted(name for call in calls for name in call) == sorted(name for name, _ in meta_names(architecture))


def test_a_model_that_asks_for_values_is_refused():
    with pytest.raises(NotWithoutValues):
        DryModel(config(), tiny_models.CONFIGS["longcat_flash"](), gpu=False)


def meta_names(architecture):
    return list(meta_model(config().model, architecture).named_parameters())

"""Models do not learn which tokens are padding, and padding changes nothing."""

import pytest
import torch
import transformers as hf
from tiny_models import CONFIGS, DENSE, rows
from transformers import AutoModelForCausalLM

from deca_ds.engine import losses
from deca_ds.engine.losses import training_loss

CPU = torch.device("cpu")
# full, sliding and linear attention, positions counted by the mask, recurrences, experts
NAMES = ("llama", "gemma2", "mistral", "gpt_oss", "minimax", "opt", "bloom", "mamba2", "jamba", "qwen2_moe", "mixtral")
BATCH = rows()


def build(make):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(make())


def trained(model):
    """Loss and gradients, and the mask that the model got."""
    masks = []
    hook = model.register_forward_pre_hook(lambda _, __, given: masks.append(given["attention_mask"]), with_kwargs=True)
    loss = training_loss(model, BATCH, CPU, 40)
    loss.backward()
    hook.remove()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), gradients, masks[0]


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradients_are_those_with_padding_hidden(name, monkeypatch):
    model = build(CONFIGS[name])
    loss, gradients, mask = trained(model)
    monkeypatch.setattr(losses, "has_auxiliary", lambda _: True)
    hidden_loss, hidden_gradients, hidden_mask = trained(model)
    assert mask.all() and torch.equal(hidden_mask, BATCH["attention_mask"]) and not hidden_mask.all()
    torch.testing.assert_close(loss, hidden_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients, hidden_gradients, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", [hf.MixtralConfig, hf.Qwen2MoeConfig])
def test_the_routers_auxiliary_loss_does_not_count_padding(make):
    config = make(**DENSE, num_key_value_heads=2, output_router_logits=True, router_aux_loss_coef=0.5)
    *_, mask = trained(build(lambda: config))
    assert torch.equal(mask, BATCH["attention_mask"])

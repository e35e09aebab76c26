"""The loss of all logits together: the next token's, without copies of them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import PretrainedConfig
from transformers.modeling_outputs import CausalLMOutput

from deca_ds.engine.losses import token_scores, training_loss

ROWS, LENGTH, VOCABULARY = 3, 37, 50


class Fixed(nn.Module):
    """A model whose logits are its parameter."""

    config = PretrainedConfig()

    def __init__(self, dtype):
        super().__init__()
        self.values = nn.Parameter(torch.randn(ROWS, LENGTH, VOCABULARY, generator=torch.Generator().manual_seed(0)))
        self.to(dtype)

    def forward(self, input_ids, attention_mask, use_cache):
        return CausalLMOutput(logits=self.values)


@pytest.fixture
def batch():
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = ids.masked_fill(ids % 5 == 0, -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_has_the_bits_of_shifted_logits(batch, dtype):
    model, targets = Fixed(dtype), 70
    losses, right, mask = token_scores(model, batch, torch.device("cpu"))
    loss = training_loss(model, batch, torch.device("cpu"), targets)
    loss.backward()

    logits, labels = model.values.detach().requires_grad_(), batch["labels"][:, 1:]
    wanted = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels.flatten(), reduction="none")
    (wanted.view(labels.shape).sum() / targets).backward()
    assert torch.equal(losses, wanted.view(labels.shape))
    assert torch.equal(mask, labels != -100)
    assert torch.equal(right, model.values[:, :-1].argmax(dim=-1) == labels)
    assert torch.equal(loss, wanted.view(labels.shape).sum() / targets)
    assert torch.equal(model.values.grad, logits.grad)


@pytest.mark.parametrize(("dtype", "conversions"), [(torch.float32, 0), (torch.bfloat16, 2)])
def test_the_loss_allocates_only_what_the_softmax_and_its_gradient_need(batch, dtype, conversions):
    """The logarithms of the softmax, their gradient and that of the logits; and to float32 and back."""
    model = Fixed(dtype)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        training_loss(model, batch, torch.device("cpu"), 70).backward()
    smallest = ROWS * (LENGTH - 1) * VOCABULARY * dtype.itemsize
    events = profiler.profiler.kineto_results.events()
    made = [event for event in events if event.name() == "[memory]" and event.nbytes() >= smallest]
    assert 0 < len(made) <= 3 + conversions

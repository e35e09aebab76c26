"""The loss of all logits together: the next token's, without copies of them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_outputs import CausalLMOutput

from deca_ds.engine.losses import token_losses, training_loss

ROWS, LENGTH, VOCABULARY = 3, 37, 50


class Fixed(nn.Module):
    """A model whose logits are its parameter."""

    config = None

    def __init__(self, dtype):
        super().__init__()
        self.values = nn.Parameter(torch.randn(ROWS, LENGTH, VOCABULARY, generator=torch.Generator().manual_seed(0)))
        self.to(dtype)

    def forward(self, input_ids, attention_mask, use_cache):
        return CausalLMOutput(logits=self.values)


class Made(TorchDispatchMode):
    """Counts the operations that return new tensors of as many elements as there are logits, or nearly so."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.numel() >= ROWS * (LENGTH - 1) * VOCABULARY:
                self.count += tensor.untyped_storage().data_ptr() not in given
        return result


@pytest.fixture
def batch():
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = ids.masked_fill(ids % 5 == 0, -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_has_the_bits_of_shifted_logits(batch, dtype):
    model, targets = Fixed(dtype), 70
    losses, mask = token_losses(model, batch, torch.device("cpu"))
    loss = training_loss(model, batch, torch.device("cpu"), targets)
    loss.backward()

    logits, labels = model.values.detach().requires_grad_(), batch["labels"][:, 1:]
    wanted = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels.flatten(), reduction="none")
    (wanted.view(labels.shape).sum() / targets).backward()
    assert torch.equal(losses, wanted.view(labels.shape))
    assert torch.equal(mask, labels != -100)
    assert torch.equal(loss, wanted.view(labels.shape).sum() / targets)
    assert torch.equal(model.values.grad, logits.grad)


@pytest.mark.parametrize(("dtype", "conversions"), [(torch.float32, 0), (torch.bfloat16, 2)])
def test_it_makes_what_the_softmax_and_its_gradient_need(batch, dtype, conversions):
    """The logarithms of the softmax, their gradient and that of the logits; and to float32 and back."""
    model = Fixed(dtype)
    with Made() as made:
        training_loss(model, batch, torch.device("cpu"), 70).backward()
    assert made.count <= 3 + conversions

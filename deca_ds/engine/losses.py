"""The loss of a causal language model, token by token."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def token_losses(model: nn.Module, batch: Mapping[str, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every next token in nats, zero where labels are -100, and the others' mask: [batch, length-1].

    batch: input_ids, attention_mask and labels, int64 [batch, length].
    """
    labels = batch["labels"].to(device)[:, 1:]
    logits = model(
        input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device), use_cache=False
    ).logits[:, :-1]
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    return losses.view(labels.shape), labels != -100


def count_targets(batch: Mapping[str, Tensor]) -> int:
    """Tokens of a batch that the loss is taken at."""
    return int((batch["labels"][:, 1:] != -100).sum())

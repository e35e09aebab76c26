"""The loss of a causal language model: token by token, as it is trained, and against the model's own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deca_ds.errors import ModelError

_ROUNDING = 1e-3  # relative; what another order of summing may make in float32


def token_losses(model: nn.Module, batch: Mapping[str, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every next token in nats, zero where labels are -100, and the others' mask: [batch, length-1].

    batch: input_ids, attention_mask and labels, int64 [batch, length].
    """
    labels = batch["labels"].to(device)
    return _losses(_forward(model, batch, device).logits, labels)


def training_loss(model: nn.Module, batch: Mapping[str, Tensor], device: torch.device, targets: int) -> Tensor:
    """A micro-batch's part of the mean loss over `targets` tokens: the parts of all micro-batches add up to it.

    With output_router_logits in the model's configuration, the router's auxiliary loss is part of it, as transformers
    computes it for this micro-batch, weighted by the micro-batch's share of the targets.
    """
    outputs = _forward(model, batch, device)
    losses, mask = _losses(outputs.logits, batch["labels"].to(device))
    loss = losses.sum() / targets
    auxiliary = _auxiliary(model, outputs)
    return loss if auxiliary is None else loss + auxiliary.to(loss.device) * (mask.sum() / targets)


@torch.no_grad()
def check_own_loss(model: nn.Module, batch: Mapping[str, Tensor], device: torch.device) -> None:
    """Raise ModelError unless the loss that the model's class computes is the one that is trained here.

    It is another where a class predicts something else than the next token, or adds terms of its own. batch: with
    targets. A model whose forward takes no labels has no loss of its own.
    """
    if "labels" not in inspect.signature(model.forward).parameters:
        return
    labels = batch["labels"].to(device)
    outputs = _forward(model, batch, device, labels=labels)
    own = getattr(outputs, "loss", None)
    if own is None:
        return
    losses, mask = _losses(outputs.logits, labels)
    auxiliary = _auxiliary(model, outputs)
    ours = float(losses.sum() / mask.sum()) + (0.0 if auxiliary is None else float(auxiliary))
    if not abs(float(own) - ours) <= _ROUNDING * max(1.0, abs(ours)):
        raise ModelError(
            f"{type(model).__name__} computes the loss {float(own):.6g} where the mean over next tokens is {ours:.6g}",
            where="model.path",
            fix="use a model that is trained by the cross-entropy of next tokens, and switch off other terms of its "
            "loss in its config.json",
        )


def count_targets(batch: Mapping[str, Tensor]) -> int:
    """Tokens of a batch that the loss is taken at."""
    return int((batch["labels"][:, 1:] != -100).sum())


def _forward(model: nn.Module, batch: Mapping[str, Tensor], device: torch.device, **more: Tensor) -> Any:
    ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
    return model(input_ids=ids, attention_mask=mask, use_cache=False, **more)


def _losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    labels, logits = labels[:, 1:], logits[:, :-1]
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    return losses.view(labels.shape), labels != -100


def _auxiliary(model: nn.Module, outputs: Any) -> Tensor | None:
    """The router's auxiliary loss with its weight, where the model computes one."""
    loss = getattr(outputs, "aux_loss", None)
    if not isinstance(loss, Tensor):
        return None
    places = (model, model.config, model.config.get_text_config())
    for place in places:
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            if (weight := getattr(place, name, None)) is not None:
                return weight * loss
    raise ModelError(
        f"{type(model).__name__} computes an auxiliary loss, and its configuration gives no weight for it",
        where="output_router_logits in the model's config.json",
        fix="set it to false there",
    )

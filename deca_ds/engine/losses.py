"""The loss of a causal language model: token by token, as it is trained, and against the model's own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from deca_ds.engine.chunked_loss import chunked_loss, chunked_scores
from deca_ds.engine.copies import on_device
from deca_ds.engine.output_head import OutputHead, find_head
from deca_ds.errors import ModelError

_ROUNDING = 1e-3  # relative; what another order of summing may make in float32
_CHUNKED = {torch.float32: _ROUNDING, torch.bfloat16: 2e-2}  # and of logits, by the model's data type


class TokenScores(NamedTuple):
    """How well a model predicts each next token; all [batch, length - 1].

    losses: cross-entropy in nats, float32, zero where labels are -100. right: whether the target is the likeliest token
    of all. targets: where labels are not -100. Both bool.
    """

    losses: Tensor
    right: Tensor
    targets: Tensor


class RowScores(NamedTuple):
    """The same summed over each row, on the CPU: loss in nats, tokens that are right, and targets; all [batch]."""

    losses: Tensor
    right: Tensor
    targets: Tensor


def row_scores(model: nn.Module, batch: Mapping[str, Tensor], device: torch.device) -> RowScores:
    """Return `token_scores`, summed over each row."""
    scores = token_scores(model, batch, device)
    return RowScores(*(each.sum(dim=1).cpu() for each in scores))


def token_scores(model: nn.Module, batch: Mapping[str, Tensor], device: torch.device) -> TokenScores:
    """Return how well the model predicts every next token.

    batch: input_ids, attention_mask and labels, int64 [batch, length]. Without gradients, positions without a target
    have no logits and those of the others are bounded, as in training.
    """
    head = None if torch.is_grad_enabled() else find_head(model)
    if head is not None:
        return _chunked_scores(model, head, batch, device)
    logits, labels = model(**_inputs(model, batch, device)).logits, on_device(batch["labels"], device)
    losses, targets = losses_of(logits, labels)
    return TokenScores(losses, logits[:, :-1].argmax(dim=-1) == labels[:, 1:], targets)


def training_loss(model: PreTrainedModel, batch: Mapping[str, Tensor], device: torch.device, targets: int) -> Tensor:
    """Return a micro-batch's part of the mean loss over `targets` tokens: the parts of all micro-batches add up to it.

    With output_router_logits in the model's configuration, the router's auxiliary loss is part of it, as transformers
    computes it for this micro-batch, weighted by the micro-batch's share of the targets. A model that is body and head
    computes logits for some positions with a target at a time. That is so whatever the rows are: the ranks of a client
    have different ones, and must reduce gradients in one order.
    """
    head = find_head(model)
    if head is None:
        outputs = model(**_inputs(model, batch, device))
        loss = losses_of(outputs.logits, on_device(batch["labels"], device))[0].sum() / targets
    else:
        labels = _predicted(batch["labels"])
        inputs = _inputs(model, batch, device)
        loss, outputs = head.run(model, lambda hidden: chunked_loss(model, head, hidden, labels, targets), inputs)
        loss = loss.sum()
    auxiliary = _auxiliary(model, outputs)
    return loss if auxiliary is None else loss + auxiliary.to(loss.device) * (count_targets(batch) / targets)


@torch.no_grad()
def check_own_loss(model: PreTrainedModel, batch: Mapping[str, Tensor], device: torch.device) -> None:
    """Raise ModelError unless the loss that the model's class computes is the one that is trained here.

    It is another where a class predicts something else than the next token, or adds terms of its own. So may be the
    loss by chunks, if what a class makes of its head's output depends on more than its forward shows. batch: with
    targets. A model whose forward takes no labels has no loss of its own.
    """
    labels = on_device(batch["labels"], device)
    own_labels = {"labels": labels} if "labels" in inspect.signature(model.forward).parameters else {}
    outputs = model(**_inputs(model, batch, device), **own_labels)
    losses, mask = losses_of(outputs.logits, labels)
    mean = float(losses.sum() / mask.sum())
    auxiliary = _auxiliary(model, outputs)
    ours = mean + (0.0 if auxiliary is None else float(auxiliary))
    own = getattr(outputs, "loss", None)
    name = type(model).__name__
    if own is not None and _differ(float(own), ours):
        raise ModelError(
            f"{name} computes the loss {float(own):.6g} where the mean over next tokens is {ours:.6g}",
            where="model.path",
            fix="use a model that is trained by the cross-entropy of next tokens, and switch off other terms of its "
            "loss in its config.json",
        )
    if (head := find_head(model)) is not None:
        by_chunks = float(_chunked_scores(model, head, batch, device).losses.sum() / mask.sum())
        if _differ(by_chunks, mean, _CHUNKED[model.dtype]):
            raise ModelError(
                f"{name} has the loss {by_chunks:.6g} with the logits of each position by itself, and {mean:.6g} with "
                "those of the whole sequence",
                where="model.path",
                fix="use a model whose logits depend on nothing but the hidden state at their position",
            )


def count_targets(batch: Mapping[str, Tensor]) -> int:
    """Count the tokens of a batch that the loss is taken at."""
    return int((batch["labels"][:, 1:] != -100).sum())


def has_auxiliary(model: nn.Module) -> bool:
    """Return whether the model computes a router's auxiliary loss."""
    config: Any = model.config
    return any(getattr(part, "output_router_logits", False) for part in (config, config.get_text_config()))


def excerpt(batch: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    """Return the batch with `length` tokens of each row, a target among them if the batch has one."""
    targets = (batch["labels"][:, 1:] != -100).any(dim=0).nonzero()
    stop = max(length, int(targets[0]) + 2 if len(targets) else 0)
    return {name: each[:, stop - length : stop] if each.dim() > 1 else each for name, each in batch.items()}


def _differ(one: float, other: float, rounding: float = _ROUNDING) -> bool:
    return not abs(one - other) <= rounding * max(1.0, abs(other))


def _inputs(model: nn.Module, batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Any]:
    """Return what the model's forward gets. Its attention mask hides no padding: that comes after a row's tokens, of
    which none looks ahead (causality.py). A mask that does would keep torch from its fastest attention kernels, and
    have transformers copy keys and values that heads share. The router's auxiliary loss alone leaves padding out."""
    ids = on_device(batch["input_ids"], device)
    mask = on_device(batch["attention_mask"], device) if has_auxiliary(model) else torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False}


def _predicted(labels: Tensor) -> Tensor:
    """Return what each position predicts, [batch, length]; the last position predicts nothing."""
    return F.pad(labels[:, 1:], (0, 1), value=-100)


def _chunked_scores(
    model: nn.Module, head: OutputHead, batch: Mapping[str, Tensor], device: torch.device
) -> TokenScores:
    labels = _predicted(batch["labels"])
    inputs = _inputs(model, batch, device)
    scores, _ = head.run(model, lambda hidden: chunked_scores(model, head, hidden, labels), inputs)
    losses, right = scores[:, :-1].unbind(dim=2)
    return TokenScores(losses, right.bool(), on_device(labels[:, :-1] != -100, device))


def losses_of(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return `losses` and `targets` of TokenScores, of whole logits, [batch, length, vocabulary]."""
    labels = _predicted(labels)  # logits[:, :-1] would copy them, and in the backward pass their gradient
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    return losses.view(labels.shape)[:, :-1].contiguous(), labels[:, :-1] != -100


def _auxiliary(model: PreTrainedModel, outputs: Any) -> Tensor | None:
    """Return the router's auxiliary loss with its weight, if the model computes one."""
    loss = getattr(outputs, "aux_loss", None)
    if not isinstance(loss, Tensor):
        return None
    places = (model, model.config, model.config.get_text_config())
    for place in places:
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            if (weight := getattr(place, name, None)) is not None:
                weighted: Tensor = weight * loss
                return weighted
    raise ModelError(
        f"{type(model).__name__} computes an auxiliary loss, and its configuration gives no weight for it",
        where="output_router_logits in the model's config.json",
        fix="set it to false there",
    )

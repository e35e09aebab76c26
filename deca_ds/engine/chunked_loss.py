"""The loss through a model's output head with the logits of some positions at a time, so that they never fill memory.

Positions without a target have no logits at all. The head's layer computes a chunk of positions together; what is made
of its output goes row by row, which on a CPU is done in pieces that stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from deca_ds.engine.copies import on_device
from deca_ds.engine.masters import add_into
from deca_ds.engine.output_head import OutputHead

Chunk: TypeAlias = tuple[Tensor, Tensor]  # positions, of batch and length flattened, and their targets, 1-D int64

LOGITS_BYTES = 128 * 2**20  # of a chunk's logits in float32
# the product with a bfloat16 weight makes as many operations of each of its bytes: with so many no GPU waits for memory
GPU_POSITIONS = 512
PIECE_BYTES = 4 * 2**20  # of a piece's; what is computed from them takes three times as much again


def positions_at_a_time(head: OutputHead, gpu: bool) -> int:
    """Return how many positions make a chunk: the head's layer computes them together. On a GPU, which would wait for
    the layer's weight with few positions, it is a multiple of GPU_POSITIONS, however large the vocabulary is."""
    positions = max(1, LOGITS_BYTES // (4 * head.linear.out_features))
    return max(1, positions // GPU_POSITIONS) * GPU_POSITIONS if gpu else positions


def positions_of_a_piece(head: OutputHead, gpu: bool) -> int:
    """Return how many positions of a chunk have losses and their gradients together: on a GPU, which has no use for
    small pieces, all of them. The numbers do not depend on it."""
    return positions_at_a_time(head, gpu) if gpu else max(1, PIECE_BYTES // (4 * head.linear.out_features))


def chunked_scores(model: nn.Module, head: OutputHead, hidden: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of every target, and 1 if it is the likeliest token, else 0; no gradients.

    hidden: [batch, length, hidden]. labels: [batch, length], on the CPU, those that each position predicts. Returns
    float32 [batch, length, 2], zero where labels are -100; of both, what belongs to a row lies together.
    """
    scores = torch.zeros(2, labels.numel(), dtype=torch.float32, device=hidden.device)
    rows, piece = hidden.flatten(0, 1), positions_of_a_piece(head, hidden.is_cuda)
    with torch.no_grad():
        for at, targets in _chunks(labels, head, hidden.device):
            output = F.linear(rows[at], head.linear.weight, head.linear.bias)
            for places, part, wanted in zip(at.split(piece), output.split(piece), targets.split(piece), strict=True):
                logits = head.logits(model, part)
                scores[1, places] = (logits.argmax(dim=-1) == wanted).float()
                scores[0, places] = F.cross_entropy(logits.float(), wanted, reduction="none")
            del output, part, logits  # before the next chunk's
    return scores.view(2, *labels.shape).movedim(0, -1)


def chunked_loss(model: nn.Module, head: OutputHead, hidden: Tensor, labels: Tensor, divisor: int) -> Tensor:
    """Sum these losses over `divisor`, [1, 1, 1], with gradients for hidden states and the head's parameters."""
    piece = positions_of_a_piece(head, hidden.is_cuda)
    return summed_loss(model, head, hidden, _chunks(labels, head, hidden.device), piece, divisor)


def summed_loss(
    model: nn.Module, head: OutputHead, hidden: Tensor, chunks: Iterable[Chunk], piece: int, divisor: int
) -> Tensor:
    """Sum the loss over the given chunks; see `chunked_loss`. piece: positions of a piece."""
    arguments = (hidden, head.linear.weight, head.linear.bias, model, head, chunks, piece, divisor)
    loss: Tensor = _SummedLoss.apply(*arguments)  # type: ignore[no-untyped-call]  # torch leaves it without types
    return loss


def _chunks(labels: Tensor, head: OutputHead, device: torch.device) -> Iterator[Chunk]:
    """Yield the positions that have a target, in flattened batch and length, and the targets, some at a time."""
    labels = labels.flatten()
    at, positions = (labels != -100).nonzero().flatten(), positions_at_a_time(head, device.type == "cuda")
    yield from zip(on_device(at, device).split(positions), on_device(labels[at], device).split(positions), strict=True)


class _SummedLoss(torch.autograd.Function):
    """Takes the gradients chunk by chunk while it computes the loss, and scales them in the backward pass.

    So each chunk's logits are computed once. The head's gradient is summed in float32, whatever its parameters are.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        model: nn.Module,
        head: OutputHead,
        chunks: Iterable[Chunk],
        piece: int,
        divisor: int,
    ) -> Tensor:
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        rows = hidden.flatten(0, 1)
        rows_grad = torch.zeros_like(rows) if for_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if for_weight else None
        bias_grad = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and for_bias else None
        total = torch.zeros(1, 1, 1, dtype=torch.float32, device=hidden.device)
        for at, targets in chunks:
            row = rows[at]
            grad = F.linear(row, weight, bias)  # the layer's output, which its gradient replaces piece by piece
            losses = [
                _loss_of_piece(model, head, part, wanted, divisor, any(ctx.needs_input_grad))
                for part, wanted in zip(grad.split(piece), targets.split(piece), strict=True)
            ]
            total += _sum(torch.cat(losses)) / divisor
            if rows_grad is not None:
                rows_grad[at] = grad @ weight
            if weight_grad is not None:
                if weight.dtype == torch.float32:
                    weight_grad.addmm_(grad.t(), row)
                else:
                    add_into(weight_grad, grad.t() @ row)
            if bias_grad is not None:
                bias_grad += grad.sum(dim=0, dtype=torch.float32)
            del grad  # before the next chunk's
        ctx.grads = (
            None if rows_grad is None else rows_grad.view_as(hidden),
            None if weight_grad is None else weight_grad.to(weight.dtype),
            None if bias is None or bias_grad is None else bias_grad.to(bias.dtype),
        )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        scale = upstream.reshape(())
        return *(None if grad is None else grad.mul_(scale) for grad in grads), None, None, None, None, None


def _loss_of_piece(
    model: nn.Module, head: OutputHead, output: Tensor, targets: Tensor, divisor: int, differentiate: bool
) -> Tensor:
    """Return the cross-entropy of each target. differentiate: overwrite `output`, of the head's layer, with the
    gradient of the losses' sum over `divisor`."""
    leaf = output.detach().requires_grad_()
    with torch.enable_grad():
        losses = F.cross_entropy(head.logits(model, leaf).float(), targets, reduction="none")
    if differentiate:
        (gradient,) = torch.autograd.grad(losses, leaf, torch.ones_like(losses) / divisor)
        output.copy_(gradient)
    return losses.detach()


def _sum(losses: Tensor) -> Tensor:
    """Add up in the order in which torch adds the losses of rows up when it is asked for nothing but their sum."""
    return F.nll_loss(-losses[:, None], torch.zeros_like(losses, dtype=torch.int64), reduction="sum")

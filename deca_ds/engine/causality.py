"""Whether a model predicts a token from those before it alone.

Encoders, as BERT's `config.json` describes one, load as causal language models, compute the loss of next tokens like
one, and see the very token that they are to predict.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deca_ds.errors import ModelError

_LENGTH = 64
# what may reach earlier tokens, of what reaches later ones: rounding, where other tokens choose other experts
_LEAK = {torch.float32: 1e-3, torch.bfloat16: 2e-2}


@torch.no_grad()
def check_causal(model: PreTrainedModel, ids: Tensor) -> None:
    """Raise ModelError if tokens change the logits of tokens before them.

    ids: one row of token ids, int64 [length]; the model gets its first 64 twice, once with others in their second half.
    All ranks of a client call this with the same row.
    """
    ids = ids[:_LENGTH]
    half = len(ids) // 2
    rows = torch.stack([ids, torch.cat([ids[:half], ids[:1].expand(len(ids) - half)])])
    logits = model(input_ids=rows, attention_mask=torch.ones_like(rows), use_cache=False).logits.float()
    changed = (logits[0] - logits[1]).square().mean(dim=1).sqrt()
    if half and changed[:half].max() > _LEAK[model.dtype] * changed[half:].max():
        raise ModelError(
            f"{type(model).__name__} sees the tokens that it is to predict: its attention is not causal",
            where="model.path",
            fix="use a decoder; an encoder's architecture is one with is_decoder: true in config.json, if trained so",
        )

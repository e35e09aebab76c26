"""Models cut the ZeRO-3 way and saved as a run's ranks would save them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import ceil
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen2Config,
)

from deca_ds.checkpoint.part import Part
from deca_ds.checkpoint.write_shards import Slice, save_shards

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
HEADS = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {
    "llama": lambda: LlamaConfig(**TINY, **HEADS),
    "qwen2_tied": lambda: Qwen2Config(**TINY, **HEADS, tie_word_embeddings=True),
    "gpt2_tied": lambda: GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, bos_token_id=0, eos_token_id=0),
    "gpt_neox": lambda: GPTNeoXConfig(**TINY, intermediate_size=48, num_attention_heads=4),
    "mixtral": lambda: MixtralConfig(**TINY, **HEADS, num_local_experts=4),
    # has a persistent buffer
    "deepseek_v3": lambda: DeepseekV3Config(
        **TINY,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=4,
        moe_intermediate_size=16,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
}

State = dict[str, Tensor]


def zero3_slices(state: Mapping[str, Tensor], rank: int, ranks: int) -> Iterator[Slice]:
    """Rank `rank`'s slice of every tensor: ceil(numel / ranks) elements, fewer or none at the end."""
    for name, tensor in state.items():
        chunk = ceil(tensor.numel() / ranks)
        start, stop = (min(tensor.numel(), r * chunk) for r in (rank, rank + 1))
        yield Slice(name, tuple(tensor.shape), start, stop, tensor.reshape(-1)[start:stop])


def save_clients(folder: Path, states: list[State], *, ranks: int, step: int = 7) -> None:
    """Save clients' states as all their ranks would, in two groups."""
    for client, state in enumerate(states):
        names = list(state)
        halves = [names[: len(names) // 2], names[len(names) // 2 :]]
        for rank in range(ranks):
            groups = [
                (f"layers {i}", zero3_slices({name: state[name] for name in half}, rank, ranks))
                for i, half in enumerate(halves)
            ]
            save_shards(folder, groups, Part(client, rank, ranks), clients=len(states), step=step)


def load_exported(folder: Path) -> PreTrainedModel:
    """Load an exported model with plain transformers; no weight may be missing or left over."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


def model_state(model: PreTrainedModel) -> State:
    """What a trainer saves: parameters under their first name, then persistent buffers."""
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    every = dict(model.named_parameters(remove_duplicate=False))
    return state | {name: tensor for name, tensor in model.state_dict().items() if name not in every}


def make_models(architecture: str, clients: int, dtype: torch.dtype) -> list[PreTrainedModel]:
    """Randomly initialised models, a different one for each client; no parameter is left at zero or one."""
    made = []
    for client in range(clients):
        torch.manual_seed(client)
        model = AutoModelForCausalLM.from_config(CONFIGS[architecture](), dtype=dtype)
        with torch.no_grad():
            for tensor in model_state(model).values():
                tensor.add_(torch.randn_like(tensor))
        made.append(model)
    return made

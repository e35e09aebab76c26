"""Blocks, gradients and written shards of other architectures, on two ranks, against the dense model."""

import json
import math

import pytest
import torch
from jobs import launch
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, MixtralConfig, Qwen2Config

SIZES = dict(vocab_size=51, hidden_size=24, intermediate_size=28, num_attention_heads=4, num_hidden_layers=2)
CONFIGS = {
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.2),
    "gpt2": GPT2Config(
        vocab_size=51, n_embd=24, n_head=4, n_layer=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, initializer_range=0.2
    ),
    "gpt-neox": GPTNeoXConfig(**SIZES, initializer_range=0.2),
    # router_jitter_noise is 0 by default: the experts' choice is the same on all ranks
    "mixtral": MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4, initializer_range=0.2),
}


@pytest.mark.multiprocess
def test_two_ranks_equal_the_dense_model_block_by_block(tmp_path):
    models = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        models[name] = AutoModelForCausalLM.from_config(config)
        models[name].save_pretrained(tmp_path / name)
    folders = [str(tmp_path / name) for name in CONFIGS]
    finished = launch("hand", 2, folders, script="tests/engine/architecture_worker.py")
    assert finished.code == 0, finished.output[-4000:]
    found = [json.loads(line[6:]) for line in finished.output.splitlines() if line.startswith("FOUND ")]

    ids = torch.randint(4, 44, (6, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :5] = -100
    for (name, model), blocks in zip(models.items(), found, strict=True):
        parameters = dict(model.named_parameters())
        assert sorted(n for block in blocks for n in block["names"]) == sorted(parameters), name
        for block in blocks:
            model.zero_grad()
            logits = model(input_ids=ids).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
            loss.backward()
            gradients = [parameters[n].grad for n in block["names"]]
            norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients))
            assert block["loss"] == pytest.approx(loss.item(), rel=1e-4), (name, block["names"][0])
            assert block["norm"] == pytest.approx(norm, rel=1e-3), (name, block["names"][0])
            with torch.no_grad():
                for n, gradient in zip(block["names"], gradients, strict=True):
                    parameters[n].sub_(gradient, alpha=0.01)

"""Tokens that are right are those that greedy decoding gives."""

import pytest
import torch
from tiny_models import CONFIGS
from transformers import AutoModelForCausalLM

from deca_ds.engine.losses import row_scores

CPU, PROMPT, ANSWER = torch.device("cpu"), 5, 6


@pytest.mark.parametrize("name", ["llama", "qwen2", "opt"])
def test_an_answer_matches_if_greedy_decoding_gives_it(name):
    """Three prompts with what the model answers, of which one has another last token and one another first token."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)  # so that answers vary
    prompts = torch.randint(3, model.config.vocab_size, (3, PROMPT))
    ids = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=ANSWER, min_new_tokens=ANSWER, do_sample=False
    )
    assert len(ids[:, PROMPT:].unique()) > 2
    ids[1, -1] = (ids[1, -1] + 1) % model.config.vocab_size
    ids[2, PROMPT] = (ids[2, PROMPT] + 1) % model.config.vocab_size
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        scores = row_scores(model, batch, CPU)
    assert scores.targets.tolist() == [ANSWER] * 3
    assert scores.right[:2].tolist() == [ANSWER, ANSWER - 1]
    assert scores.right[2] < ANSWER

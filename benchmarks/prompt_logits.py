"""What a step costs without logits where nothing is learned, against all logits.

    python benchmarks/prompt_logits.py

A random Llama on the CPU, one thread: a forward and a backward pass of the training loss, of rows in which every
position has a target, and of rows in which the last four have, as answers to prompts do. Trained are the layers, or the
head. The two ways alternate in this process; a figure is the lower quartile of CPU milliseconds. Prints a line a case
and writes benchmarks/results/prompt_logits.json.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deca_ds.engine import losses

LAYERS, ANSWER, TIMES = 4, 4, 12
RESULTS = Path(__file__).parent / "results" / "prompt_logits.json"
SIZES = [(512, 64, 4, 128), (4096, 128, 16, 32), (32_000, 256, 2, 128)]  # vocabulary, hidden size, rows, tokens


def case(model: LlamaForCausalLM, rows: int, length: int, answers: bool, head: bool) -> dict[str, float]:
    ids = torch.randint(0, model.config.vocab_size, (rows, length))
    labels = ids.clone()
    if answers:
        labels[:, :-ANSWER] = -100
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("lm_head") == head)
    targets, find_head = losses.count_targets(batch), losses.find_head
    times: dict[str, list[float]] = {"all_logits": [], "targets_only": []}
    for _ in range(TIMES):
        for name, find in (("all_logits", lambda _: None), ("targets_only", find_head)):
            losses.find_head = find
            started = time.process_time()
            losses.training_loss(model, batch, torch.device("cpu"), targets).backward()
            times[name].append(time.process_time() - started)
            model.zero_grad()
    losses.find_head = find_head
    return {name: round(1e3 * sorted(taken)[TIMES // 4], 1) for name, taken in times.items()}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found: list[dict[str, Any]] = []
    for vocabulary, hidden, rows, length in SIZES:
        sizes = dict(hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=LAYERS, num_attention_heads=4)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **sizes))
        for answers in (False, True):
            for head in (False, True):
                ms = case(model, rows, length, answers, head)
                about = {"vocabulary": vocabulary, "hidden": hidden, "rows": rows, "tokens": length}
                about |= {"targets": "the last four" if answers else "all", "trained": "head" if head else "layers"}
                found.append(about | {"cpu_ms": ms, "ratio": round(ms["targets_only"] / ms["all_logits"], 2)})
                print(json.dumps(found[-1]), flush=True)
    RESULTS.write_text(json.dumps({"layers": LAYERS, "cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()

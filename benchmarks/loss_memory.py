"""What the loss takes at a large vocabulary: by chunks of positions, and with all logits together.

    python benchmarks/loss_memory.py

A random Llama of one layer and hidden size 64 with a vocabulary of 128,256 tokens (Llama 3's), on the CPU. Each case is
a process of its own: a forward and a backward pass of the training loss, or the scores of an evaluation. A figure is
the peak of what torch has allocated in that pass, above what there was before it. The gradient of the head, where it is
trained, is part of it. Prints a line a case and writes benchmarks/results/loss_memory.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

DEADLINE_S = 600
VOCABULARY, HIDDEN, ROWS, LENGTH = 128_256, 64, 2, 1024
RESULTS = Path(__file__).parent / "results" / "loss_memory.json"
# what runs, whether the head is trained (else the layer below it), data type
CASES = [
    ("training", False, "float32"),
    ("training", True, "float32"),
    ("training", False, "bfloat16"),
    ("evaluation", False, "float32"),
    ("evaluation", False, "bfloat16"),
]


def peak_allocated(action: Any) -> int:
    """Bytes: the most that was allocated on the CPU at a time during `action`, above what was there before."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    level = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU:
            level += event.nbytes()
            most = max(most, level)
    return most


def case(kind: str, head: bool, dtype: str, whole: bool) -> dict[str, Any]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from deca_ds.engine import losses
    from deca_ds.engine.losses import token_scores, training_loss

    torch.set_num_threads(1)
    torch.manual_seed(0)
    if whole:
        losses.find_head = lambda model: None
    sizes = dict(hidden_size=HIDDEN, intermediate_size=HIDDEN, num_hidden_layers=1, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes)).to(getattr(torch, dtype))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("lm_head") == head and "embed" not in name)
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    cpu = torch.device("cpu")
    found = []

    def run() -> None:
        if kind == "training":
            loss = training_loss(model, batch, cpu, ids.numel() - ROWS)
            loss.backward()
        else:
            with torch.no_grad():
                loss = token_scores(model, batch, cpu).losses.mean()
        found.append(float(loss.detach()))

    used = time.process_time()
    most = peak_allocated(run)
    return {"peak_bytes": most, "cpu_seconds": round(time.process_time() - used, 2), "loss": found[0]}


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(case(*json.loads(sys.argv[1]))))
        return
    found = []
    for kind, head, dtype in CASES:
        both = {}
        for name, whole in (("chunks", False), ("whole", True)):
            command = [sys.executable, __file__, json.dumps([kind, head, dtype, whole])]
            done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=True)
            both[name] = json.loads(done.stdout.splitlines()[-1])
        found.append({"kind": kind, "head_trained": head, "dtype": dtype} | both)
        print(json.dumps(found[-1]), flush=True)
    about = {"vocabulary": VOCABULARY, "hidden": HIDDEN, "positions": ROWS * LENGTH}
    RESULTS.write_text(json.dumps(about | {"cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()

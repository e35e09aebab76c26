"""Peak memory of block-wise DECA and of AdamW on the whole model, and what 200 block switches leave behind.

    python benchmarks/memory.py

Each case is a process of its own, on the CPU in float32, on the same random Llama of about 110 million parameters and
the same short batch, so that activations hardly count. A figure is the peak resident memory of the process minus what
it is after a step of a tiny model, so that no library is in it. DECA trains every block once, one step each, with
blocks of one layer. In the cases with several steps it trains the largest block instead, the embeddings, with more
tokens: what the C library keeps of freed memory grows over the first steps.

`estimated` is what `deca plan` says, and `error` its distance from what was measured, as a share. `freed` is what glibc
gives back of freed pieces when it is asked for them afterwards, and `kept` how much of it the plan foresees.
Prints a line a case and writes benchmarks/results/memory.json. Where freed memory is returned, the plan must be within
5 % of what was measured, or the exit code is 1.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apart import REPOSITORY, RETURN, run_apart

if TYPE_CHECKING:
    from deca_ds.config import Config

DEADLINE_S = 400
ROWS, LENGTH = 1, 64
STEPS, LONGER = 8, 256  # of the cases with several steps, and their tokens
SHAPE = dict(
    vocab_size=16384, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
)  # fmt: skip
TINY = SHAPE | dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
SMALL = SHAPE | dict(vocab_size=2048, hidden_size=192, intermediate_size=512, num_hidden_layers=4)
LEAN = f"deepspeed={REPOSITORY / 'ds_configs' / 'zero3_lean.json'}"
WARM_UP_SWITCHES, SWITCHES = 40, 200
# Of torch: tensors of 2 MB and more in the kernel's usual pages. The other cases have huge ones, as the trainer does.
SMALL_PAGES = {"THP_MEM_ALLOC_ENABLE": "0"}
LIMIT = 0.05  # of the plan's error
# name: kind, ranks, overrides, environment
CASES: dict[str, tuple[str, int, list[str], dict[str, str]]] = {
    "AdamW, whole model": ("adamw", 1, [], {}),
    "DECA, 1 rank, DeepSpeed's defaults": ("deca", 1, [], {}),
    "DECA, 1 rank, lean": ("deca", 1, [LEAN], {}),
    "DECA, 1 rank, lean, small pages": ("deca", 1, [LEAN], SMALL_PAGES),
    "DECA, 1 rank, lean, freed memory returned": ("deca", 1, [LEAN], RETURN),
    "DECA, 2 ranks, lean": ("deca", 2, [LEAN], {}),
    "DECA, 2 ranks, lean, small pages": ("deca", 2, [LEAN], SMALL_PAGES),
    "DECA, 2 ranks, lean, freed memory returned": ("deca", 2, [LEAN], RETURN),
    "8 steps, 1 rank, lean": ("steps", 1, [LEAN], {}),
    "8 steps, 1 rank, lean, freed memory returned": ("steps", 1, [LEAN], RETURN),
    "8 steps, 2 ranks, lean": ("steps", 2, [LEAN], {}),
    "8 steps, 2 ranks, lean, freed memory returned": ("steps", 2, [LEAN], RETURN),
    "DECA, 200 switches": ("switches", 1, [LEAN], {}),
}


def adamw() -> dict[str, Any]:
    """Three steps of torch's AdamW on the whole model: parameters, gradients and two moments, 16 bytes a parameter."""
    import torch
    from resident import peak_of
    from transformers import AutoModelForCausalLM, LlamaConfig

    def train(shape: dict[str, Any]) -> int:
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        ids = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH)
        for _ in range(3):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return sum(p.numel() for p in model.parameters())

    train(TINY)
    before = settled()
    parameters = 0

    def measured() -> None:
        nonlocal parameters
        parameters = train(SHAPE)

    return {"bytes": peak_of(measured) - before, "parameters": parameters}


def settled() -> int:
    """Resident bytes without what was freed."""
    import gc

    from resident import resident

    from deca_ds.engine.heap import return_freed_memory

    gc.collect()
    return_freed_memory()
    return resident()


def deca(kind: str, overrides: list[str]) -> dict[str, Any]:
    """Train one client: every block once (kind deca), the first block for several steps (kind steps), or many block
    switches on a small model (kind switches)."""
    import gc
    import math

    import torch
    from one_client import lonely_step, one_client
    from planned import estimate_of, in_step, kept_in
    from resident import peak_of, resident

    from deca_ds.algorithm.deca import DecaRule
    from deca_ds.engine.client import Client
    from deca_ds.engine.heap import return_freed_memory

    length, steps = (LONGER, STEPS) if kind == "steps" else (LENGTH, 1)
    ids = torch.arange(ROWS * length).view(ROWS, length)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    keys = ["data.micro_batch_size=1", *overrides]
    with one_client() as make:

        def train(client: Client, config: Config, switches: int) -> None:
            step = lonely_step(config, client, DecaRule(), batch)
            for switch in range(switches):
                state = client.open_block(switch % len(client.plan.blocks), DecaRule.buffers)
                for _ in range(steps):
                    step(state)
                client.close_block()
                del state

        def live() -> dict[str, int]:
            gc.collect()
            tensors = sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
            return {"resident_bytes": resident(), "live_tensors": tensors}

        config, client = make(TINY, keys)
        train(client, config, 1)
        del client
        before = settled()
        config, client = make(SMALL if kind == "switches" else SHAPE, keys)
        size = {"parameters": sum(map(math.prod, client.shapes.values()))}
        if kind == "switches":
            train(client, config, WARM_UP_SWITCHES)
            warm = live()
            train(client, config, SWITCHES)
            return size | {"before": warm, "after": live(), "switches": SWITCHES}
        blocks = [sum(math.prod(client.shapes[name]) for name in block.names) for block in client.plan.blocks]
        trained = 1 if kind == "steps" else len(blocks)
        started = time.process_time()
        most = peak_of(lambda: train(client, config, trained)) - before
        seconds = time.process_time() - started
        gc.collect()
        freed = resident()
        return_freed_memory()
        freed -= resident()
        estimate = estimate_of(SHAPE, length, torch.distributed.get_world_size(), overrides)
        fullest = max(estimate.by_block[:trained], key=in_step)
        planned = in_step(fullest)
        return size | {
            "largest_block": max(blocks), "bytes": most, "freed": freed, "kept": kept_in(fullest), "estimated": planned,
            "error": round(planned / most - 1, 3), "cpu_seconds": seconds,
        }  # fmt: skip


def run(kind: str, ranks: int, overrides: list[str], extra: dict[str, str]) -> dict[str, Any]:
    """One case in processes of its own; of several ranks, the one that took most."""
    with tempfile.TemporaryDirectory() as folder:
        run_apart(__file__, ranks, [kind, *overrides], extra | {"DECA_BENCHMARK_OUTPUT": folder}, DEADLINE_S)
        return max((json.loads(path.read_text()) for path in Path(folder).iterdir()), key=lambda r: r.get("bytes", 0))


def main() -> None:
    results = {}
    for name, case in CASES.items():
        results[name] = result = run(*case)
        if "bytes" in result:
            result["bytes_per_parameter"] = round(result["bytes"] / result["parameters"], 2)
            result["of_adamw"] = round(result["bytes"] / results["AdamW, whole model"]["bytes"], 3)
        print(name, result, flush=True)
    target = REPOSITORY / "benchmarks" / "results" / "memory.json"
    target.write_text(json.dumps(results, indent=1) + "\n")
    off = [name for name, case in CASES.items() if case[3] is RETURN and abs(results[name]["error"]) > LIMIT]
    if off:
        sys.exit(f"the plan is more than {LIMIT:.0%} off: {'; '.join(off)}")


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--")]  # the launcher adds --local_rank
    if words:
        report = adamw() if words[0] == "adamw" else deca(words[0], words[1:])
        (Path(os.environ["DECA_BENCHMARK_OUTPUT"]) / f"{os.environ.get('RANK', 0)}.json").write_text(json.dumps(report))
    else:
        main()

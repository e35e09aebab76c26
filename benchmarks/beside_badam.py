"""A step of one client without neighbours beside BAdam's public package: seconds and peak memory, in one sitting.

    python -m pip install --no-deps badam
    python benchmarks/beside_badam.py

Both train the same random Llama on the same batch, with the same blocks in the same order and as many steps between two
switches; masters, gradients and moments are float32 on both sides. BAdam: `BlockOptimizer` around torch.optim.AdamW in
its single-process mode, with the block list of our plan. Ours: method `badam`, DeepSpeed's defaults. Neither clips.

Each side is one process with one thread. The two take turns, a step at a time, and while one works the other waits.
Ratios are ours over BAdam's, of steps that follow each other. The last step of a turn, in which both sides switch
blocks, does not count. Memory is the peak of a process's resident memory, all of it and what came after the imports.
Prints a line for each data type, or for the one that is given, and writes benchmarks/results/beside_badam.json.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
ROWS, LENGTH = 4, 256
SHAPE = dict(
    vocab_size=16384, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
)  # fmt: skip
PLACES = (0, 4, 8, 12, 13)  # of the blocks that are trained, in the plan: the embeddings, three layers, the head
STEPS, ROUNDS = 3, 2  # of a block's turn, without the last, in which both sides switch; turns of each block
DEADLINE_S = 600  # of a step
SIDES = ("badam", "ours")


def resident(name: str) -> int:
    """VmRSS, or VmHWM, its peak, of this process, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def ours(dtype: str) -> Iterator[Any]:
    """Yields once after the imports, then each step's loss, for ever; None at the last of a turn, which switches."""
    import deepspeed  # noqa: F401  part of the imports
    from one_client import lonely_step, one_client, random_batch

    from deca_ds.algorithm.methods import build_rule

    yield
    rule, batch = build_rule("badam"), random_batch(SHAPE, ROWS, LENGTH)
    overrides = [f"model.dtype={dtype}", f"data.micro_batch_size={ROWS}", "optimizer.clip_norm=0"]
    with one_client() as make:
        config, client = make(SHAPE, overrides)
        step = lonely_step(config, client, rule, batch)
        client.open_block(PLACES[0], rule.buffers)
        for place in itertools.cycle((*PLACES[1:], PLACES[0])):
            for _ in range(STEPS):
                yield step(client.active)
            step(client.active)
            client.close_block()
            client.open_block(place, rule.buffers)
            yield


def badam(dtype: str) -> Iterator[Any]:
    """As `ours`."""
    import torch
    from badam import BlockOptimizer
    from one_client import random_batch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from deca_ds.algorithm.blocks import split_into_blocks

    torch.set_num_threads(1)
    yield
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), dtype=getattr(torch, dtype))
    blocks = split_into_blocks(model, layers_per_block=1, outside="own").blocks
    optimizer = BlockOptimizer(
        base_optimizer=torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0),
        named_parameters_list=list(model.named_parameters()),
        block_prefix_list=[list(blocks[place].names) for place in PLACES],
        switch_block_every=STEPS + 1,
        switch_mode="ascending",
    )
    batch = random_batch(SHAPE, ROWS, LENGTH)
    model.train()
    while True:
        for step in range(STEPS + 1):  # the last one switches
            loss = model(**batch, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield float(loss.detach()) if step < STEPS else None


def serve(side: str, dtype: str) -> None:
    """Make a step for every line that comes in, and answer with a line of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    steps = {"ours": ours, "badam": badam}[side](dtype)
    next(steps)
    imported = resident("VmRSS")
    for _ in sys.stdin:
        started, used = time.perf_counter(), time.process_time()
        loss = next(steps)
        answer = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - used, "loss": loss}
        answers.write(json.dumps(answer | {"peak": resident("VmHWM"), "imported": imported}) + "\n")
        answers.flush()
    steps.close()


def ask(side: subprocess.Popen[str]) -> dict[str, Any]:
    side.stdin.write("step\n")
    side.stdin.flush()
    answer = side.stdout.readline() if select.select([side.stdout], [], [], DEADLINE_S)[0] else ""
    if not answer:
        side.kill()
        raise SystemExit("one side has ended, see above, or takes too long")
    return json.loads(answer)


def compare(dtype: str) -> dict[str, Any]:
    """Both sides by turns. The first step of each takes the set-up in and counts for nothing, nor does its block."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    sides = {side: subprocess.Popen([sys.executable, __file__, side, dtype], **pipes) for side in SIDES}
    taken: dict[str, list[list[dict[str, Any]]]] = {side: [] for side in SIDES}
    try:
        for _ in range(1 + ROUNDS * len(PLACES)):
            for side in SIDES:
                taken[side].append([])
            for step in range(STEPS + 1):
                for side in SIDES if step % 2 else SIDES[::-1]:
                    taken[side][-1].append(ask(sides[side]))
    finally:
        for side in sides.values():
            side.stdin.close()
        for side in sides.values():
            side.wait(60)
    return summary(taken)


def summary(taken: dict[str, list[list[dict[str, Any]]]]) -> dict[str, Any]:
    result: dict[str, Any] = {"steps": STEPS * (len(taken["ours"]) - 1)}
    for clock in ("cpu_seconds", "seconds"):
        steps = {side: [step[clock] for turn in turns[1:] for step in turn[:-1]] for side, turns in taken.items()}
        quotients = [x / y for x, y in zip(steps["ours"], steps["badam"], strict=True)]
        low, middle, high = (round(quotient, 3) for quotient in statistics.quantiles(quotients, n=4))
        result[clock] = {side: round(statistics.median(each), 3) for side, each in steps.items()}
        result[clock] |= {"ratio": middle, "quartiles": [low, high]}
    ends = {side: turns[-1][-1] for side, turns in taken.items()}
    result["peak_bytes"] = {side: end["peak"] for side, end in ends.items()}
    result["peak_bytes_after_imports"] = {side: end["peak"] - end["imported"] for side, end in ends.items()}
    for name in ("peak_bytes", "peak_bytes_after_imports"):
        result[name]["ratio"] = round(result[name]["ours"] / result[name]["badam"], 3)
    result["loss"] = {side: [turn[0]["loss"] for turn in turns] for side, turns in taken.items()}
    return result


def main() -> None:
    if importlib.util.find_spec("badam") is None:
        raise SystemExit(
            "BAdam's package is not installed here: python -m pip install --no-deps badam (in an environment of its "
            "own, if you like; it needs nothing but torch and transformers)"
        )
    results = {}
    for dtype in sys.argv[1:] or ("float32", "bfloat16"):
        results[dtype] = compare(dtype)
        print(dtype, json.dumps(results[dtype]), flush=True)
    target = REPOSITORY / "benchmarks" / "results" / "beside_badam.json"
    target.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] in SIDES:
        serve(*sys.argv[1:])
    else:
        main()

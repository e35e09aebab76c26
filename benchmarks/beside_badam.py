"""One client without neighbours against BAdam's public package: time, Python calls and peak memory of a step.

    python -m pip install --no-deps badam
    python benchmarks/beside_badam.py [words]       # the cases whose names have all words in them; without: all

Both train the same random Llama on the same batch, with the same blocks in the same order and equally many steps
between two switches; masters, gradients and moments are float32 on both sides. BAdam: `BlockOptimizer` around
torch.optim.AdamW in its single-process mode, with the block list of our plan. Ours: method `badam`, DeepSpeed's
defaults. Neither clips.

Each side is one process with one thread. The two alternate step by step, and while one works the other waits. Ratios
are ours over BAdam's, of steps that follow each other, and of the sums of each block's least times. Two steps of an
activation do not count: the last, in which both sides switch blocks, and the one before it, in which the script counts
calls of Python functions (and of C functions from Python). Memory is the peak of a process's resident memory, in total
and since the imports.
The script prints a line for each case, and writes them to benchmarks/results/beside_badam.json.
"""

from __future__ import annotations

import contextlib
import cProfile
import importlib.util
import itertools
import json
import os
import pstats
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from apart import ENVIRONMENT, REPOSITORY
from resident import resident


@dataclass(frozen=True)
class Case:
    """dtype: of the model. layers: of a block. places: of the blocks that are trained, in the plan: the embeddings,
    some layers, the head. tokens: rows and length of the batch. masters: ours, of a bfloat16 model; BAdam rounds
    its own at every switch."""

    dtype: str
    layers: int
    checkpointing: bool
    shape: dict[str, int]
    places: tuple[int, ...]
    tokens: tuple[int, int]
    masters: str = "exact"


SMALL = dict(
    vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=12, num_attention_heads=8,
)  # fmt: skip
LARGE = dict(
    vocab_size=16384, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
)  # fmt: skip
PLACES = {1: (0, 4, 8, 12, 13), 2: (0, 2, 4, 6, 7)}
CASES = (
    {
        f"47M, 2 x 128 tokens, {dtype}, {layers} layer{'s' * (layers > 1)}{', checkpointing' * checkpointing}": Case(
            dtype, layers, checkpointing, SMALL, PLACES[layers], (2, 128)
        )
        for dtype in ("float32", "bfloat16")
        for layers in (1, 2)
        for checkpointing in (False, True)
    }
    | {
        f"110M, 4 x 256 tokens, {dtype}, 1 layer": Case(dtype, 1, False, LARGE, PLACES[1], (4, 256))
        for dtype in ("float32", "bfloat16")
    }
    | {
        "47M, 2 x 128 tokens, bfloat16, 1 layer, rounded": Case(
            "bfloat16", 1, False, SMALL, PLACES[1], (2, 128), "rounded"
        )
    }
)
STEPS, ROUNDS = 6, 1  # of an activation, without its last two; activations of each block
DEADLINE_S = 600  # of a step
SIDES = ("badam", "ours")


def ours(case: Case) -> Generator[Any, None, None]:
    """Yield once after the imports, then each step's loss, for ever; None for the last step of an activation, which
    switches blocks."""
    import deepspeed  # noqa: F401  part of the imports
    from one_client import lonely_step, one_client, random_batch

    from deca_ds.algorithm.methods import build_rule

    yield
    rule, batch = build_rule("badam"), random_batch(case.shape, *case.tokens)
    overrides = [f"model.dtype={case.dtype}", f"data.micro_batch_size={case.tokens[0]}", "optimizer.clip_norm=0"]
    overrides += [f"model.masters={case.masters}", f"blocks.layers_per_block={case.layers}"]
    overrides += [f"model.gradient_checkpointing={case.checkpointing}"]
    with one_client() as make, contextlib.suppress(GeneratorExit):  # no more steps are wanted: no failure
        config, client = make(case.shape, overrides)
        step = lonely_step(config, client, rule, batch)
        client.open_block(case.places[0], rule.buffers)
        for place in itertools.cycle((*case.places[1:], case.places[0])):
            for _ in range(STEPS + 1):
                yield step(client.active)
            step(client.active)
            client.close_block()
            client.open_block(place, rule.buffers)
            yield


def badam(case: Case) -> Generator[Any, None, None]:
    """As `ours`."""
    import torch
    from badam import BlockOptimizer
    from one_client import random_batch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from deca_ds.algorithm.blocks import split_into_blocks

    torch.set_num_threads(1)
    yield
    model = AutoModelForCausalLM.from_config(LlamaConfig(**case.shape), dtype=getattr(torch, case.dtype))
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    blocks = split_into_blocks(model, layers_per_block=case.layers, outside="own").blocks
    optimizer = BlockOptimizer(
        base_optimizer=torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0),
        named_parameters_list=list(model.named_parameters()),
        block_prefix_list=[list(blocks[place].names) for place in case.places],
        switch_block_every=STEPS + 2,
        switch_mode="ascending",
    )
    batch = random_batch(case.shape, *case.tokens)
    model.train()
    while True:
        for step in range(STEPS + 2):  # the last one switches
            loss = model(**batch, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield float(loss.detach()) if step <= STEPS else None


def serve(side: str, case: str) -> None:
    """Make a step for every line that comes in, and answer with a line of JSON. To "count": with its calls."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    steps = {"ours": ours, "badam": badam}[side](CASES[case])
    next(steps)
    imported = resident("VmRSS")
    for line in sys.stdin:
        profile = cProfile.Profile()
        if line == "count\n":
            profile.enable()
        started, used = time.perf_counter(), time.process_time()
        loss = next(steps)
        answer = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - used, "loss": loss}
        profile.disable()
        if line == "count\n":
            answer["calls"] = pstats.Stats(profile).total_calls  # type: ignore[attr-defined]
        answers.write(json.dumps(answer | {"peak": resident("VmHWM"), "imported": imported}) + "\n")
        answers.flush()
    steps.close()


def ask(side: subprocess.Popen[str], what: str) -> dict[str, Any]:
    assert side.stdin is not None and side.stdout is not None
    side.stdin.write(f"{what}\n")
    side.stdin.flush()
    answer = side.stdout.readline() if select.select([side.stdout], [], [], DEADLINE_S)[0] else ""
    if not answer:
        side.kill()
        raise SystemExit("one side has ended, see above, or takes too long")
    return json.loads(answer)


def compare(case: str) -> dict[str, Any]:
    """Run both sides alternately. The first step of each contains its set-up, so neither it nor its block counts."""
    environment = os.environ | ENVIRONMENT
    sides = {
        side: subprocess.Popen(
            [sys.executable, __file__, side, case], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment,
        )
        for side in SIDES
    }  # fmt: skip
    taken: dict[str, list[list[dict[str, Any]]]] = {side: [] for side in SIDES}
    try:
        for _ in range(1 + ROUNDS * len(CASES[case].places)):
            for side in SIDES:
                taken[side].append([])
            for step in range(STEPS + 2):
                for side in SIDES if step % 2 else SIDES[::-1]:
                    taken[side][-1].append(ask(sides[side], "count" if step == STEPS else "step"))
    finally:
        for process in sides.values():
            if process.stdin is not None:
                process.stdin.close()
        for process in sides.values():
            process.wait(60)
    return summary(taken)


def summary(taken: dict[str, list[list[dict[str, Any]]]]) -> dict[str, Any]:
    result: dict[str, Any] = {"steps": STEPS * (len(taken["ours"]) - 1)}
    for clock in ("cpu_seconds", "seconds"):
        steps = {
            side: [step[clock] for block in blocks[1:] for step in block[:STEPS]] for side, blocks in taken.items()
        }
        quotients = [x / y for x, y in zip(steps["ours"], steps["badam"], strict=True)]
        low, middle, high = (round(quotient, 3) for quotient in statistics.quantiles(quotients, n=4))
        result[clock] = {side: round(statistics.median(each), 3) for side, each in steps.items()}
        result[clock] |= {"ratio": middle, "quartiles": [low, high]}
        # of each block the least, which other jobs on the machine have disturbed least
        least = {
            side: sum(min(step[clock] for step in block[:STEPS]) for block in blocks[1:])
            for side, blocks in taken.items()
        }
        result[clock]["ratio_of_least"] = round(least["ours"] / least["badam"], 3)
    calls = {side: [block[STEPS]["calls"] for block in blocks[1:]] for side, blocks in taken.items()}
    result["calls"] = {side: int(statistics.median(each)) for side, each in calls.items()}
    ends = {side: blocks[-1][-1] for side, blocks in taken.items()}
    result["peak_bytes"] = {side: end["peak"] for side, end in ends.items()}
    result["peak_bytes_after_imports"] = {side: end["peak"] - end["imported"] for side, end in ends.items()}
    for name in ("peak_bytes", "peak_bytes_after_imports"):
        result[name]["ratio"] = round(result[name]["ours"] / result[name]["badam"], 3)
    result["loss"] = {side: [block[0]["loss"] for block in blocks] for side, blocks in taken.items()}
    return result


def main() -> None:
    if importlib.util.find_spec("badam") is None:
        raise SystemExit(
            "BAdam's package is not installed here: python -m pip install --no-deps badam (in an environment of its "
            "own, if you like; it needs nothing but torch and transformers)"
        )
    target = REPOSITORY / "benchmarks" / "results" / "beside_badam.json"
    results = json.loads(target.read_text()) if target.exists() else {}
    for case in (case for case in CASES if all(word in case for word in sys.argv[1:])):
        results[case] = compare(case)
        print(case, json.dumps(results[case]), flush=True)
        target.write_text(json.dumps({name: results[name] for name in CASES if name in results}, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] in SIDES:
        serve(*sys.argv[1:])
    else:
        main()

"""Where the memory of one client goes: a bfloat16 Llama of 1.24 billion parameters, at rest and at the peak of a step.

    python benchmarks/client_memory.py

The shape of Llama 3.2 1B with random weights, blocks of one layer, one sequence of 256 tokens a rank, on the CPU with
one thread a rank. Each case is a job of its own, of one or two ranks. All figures are resident memory of a process
(Linux), above what it is after a step of a tiny model, so that libraries are in none of them:

    at rest   a block has just been opened; explained by the model's shard, by the low halves of the masters, which are
              on the host (on a CPU that is the same memory), and by 16 bytes for each of the block's elements: master,
              gradient, two moments
    peak      the most during a step (the second one); explained by what is there at rest, and by what torch has
              allocated above it at the worst moment, by kind

`unexplained` is the share of either figure that this leaves; `estimated` is what `deca plan` says, and `error` its
distance from what was measured, as a share. glibc keeps freed pieces below 32 MiB for the next ones: `freed` is what it
gives back when it is asked after that step. Prints a line a block and writes benchmarks/results/client_memory.json.
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from apart import REPOSITORY, RETURN, run_apart

DEADLINE_S = 1200
LENGTH = 256
SHAPE = dict(
    vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, tie_word_embeddings=True,
)  # fmt: skip
TINY = SHAPE | dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
OVERRIDES = ["model.dtype=bfloat16", "data.micro_batch_size=1"]
LEAN = f"deepspeed={REPOSITORY / 'ds_configs' / 'zero3_lean.json'}"
# name, ranks, overrides, environment, places of the blocks in the plan and whether they make steps: 0 is the largest,
# the embeddings
CASES = [
    ("1 rank", 1, [], {}, {8: True, 0: True}),
    # a step of the embeddings would take both ranks over the memory of the machine
    ("2 ranks", 2, [LEAN], {}, {8: True, 0: False}),
    ("2 ranks, freed memory returned", 2, [LEAN], RETURN, {8: True, 0: False}),
]
# what allocates, by part of the operations' names; the first that fits
KINDS = {
    "loss and its gradient": ("softmax", "nllloss", "nll_loss", "cross_entropy", "summedloss"),
    "gradients of linear layers and embeddings": ("embedding_dense_backward", "linearthatsaveswhatisneededbackward"),
}  # fmt: skip
OTHERS = "activations, logits; of several ranks also gathered parameters and buckets of gradients"


def allocated_at_peak(action: Callable[[], object]) -> dict[str, int]:
    """Bytes by kind, at the moment when most is allocated, of what torch allocates during the action."""
    from torch._C._profiler import _EventType
    from torch.profiler import ProfilerActivity, profile

    def walk(event: Any, names: tuple[str, ...]) -> Iterator[tuple[int, int, int, tuple[str, ...]]]:
        if event.tag == _EventType.Allocation:
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size, names
        for child in event.children:
            yield from walk(child, (*names, event.name))

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    roots = profiler.profiler.kineto_results.experimental_event_tree()
    level = most = 0
    live: dict[int, tuple[int, tuple[str, ...]]] = {}
    at_peak: list[tuple[int, tuple[str, ...]]] = []
    for _, address, size, names in sorted(event for root in roots for event in walk(root, ())):
        if size > 0:
            live[address] = (size, names)
        elif live.pop(address, None) is None:
            continue  # was there before
        level += size
        if level > most:
            most, at_peak = level, list(live.values())
    kinds: Counter[str] = Counter()
    for size, names in at_peak:
        kinds[kind(names)] += size
    return dict(kinds)


def kind(names: tuple[str, ...]) -> str:
    chain = " ".join(names).lower()
    for name, marks in KINDS.items():
        if any(mark in chain for mark in marks):
            return name
    return OTHERS


def measure(places: dict[int, bool], overrides: list[str]) -> dict[str, Any]:
    import torch
    from one_client import lonely_step, one_client, random_batch
    from planned import at_rest as planned_at_rest
    from planned import estimate_of, in_step
    from resident import peak_of, resident

    from deca_ds.algorithm.methods import build_rule
    from deca_ds.engine.heap import return_freed_memory

    rule = build_rule("badam")
    with one_client() as make:
        config, client = make(TINY, [*OVERRIDES, *overrides])
        lonely_step(config, client, rule, random_batch(TINY, 1, LENGTH))(client.open_block(0, rule.buffers))
        client.close_block()
        del client
        gc.collect()
        return_freed_memory()
        process = resident()
        config, client = make(SHAPE, [*OVERRIDES, *overrides])
        step = lonely_step(config, client, rule, random_batch(SHAPE, 1, LENGTH))
        names = [name for block in client.plan.blocks for name in block.names]
        at_rest = {
            "model": sum(values.nbytes for *_, values in client.shards(names)),
            "low halves of masters": sum(bits.nbytes for *_, bits in client.low_bits(names)),
        }
        numels = [sum(math.prod(client.shapes[name]) for name in block.names) for block in client.plan.blocks]
        result: dict[str, Any] = {
            "ranks": torch.distributed.get_world_size(), "parameters": sum(numels), "largest_block": max(numels),
            "process": process, "loaded": resident() - process, "blocks": {},
        }  # fmt: skip
        for place, steps in places.items():
            state = client.open_block(place, rule.buffers)
            parts = at_rest | {"block": sum(tensor.nbytes for tensor in state.tensors.values())}
            found: dict[str, Any] = {"at_rest": balance(resident() - process, parts)}
            if steps:
                step(state)
                found["peak"] = balance(peak_of(partial(step, state)) - process, parts)
                after = resident()
                return_freed_memory()
                found["peak"]["freed"] = after - resident()
            result["blocks"][client.plan.blocks[place].label] = found
            del state
            client.close_block()
        plan = estimate_of(SHAPE, LENGTH, result["ranks"], [*OVERRIDES, *overrides])
        for place in places:
            block, found = plan.by_block[place], result["blocks"][plan.by_block[place].label]
            for name, estimated in (("at_rest", planned_at_rest(block)), ("peak", in_step(block))):
                if name in found:
                    error = round(estimated / found[name]["bytes"] - 1, 4)
                    found[name] |= {"estimated": estimated, "error": error}
        for place in (place for place, steps in places.items() if steps):  # last: a profile takes memory, too
            found = result["blocks"][client.plan.blocks[place].label]["peak"]
            state = client.open_block(place, rule.buffers)
            step(state)  # so that ZeRO-3 gathers as in the step that was measured: the first one, it gathers less ahead
            found |= balance(found["bytes"], found["parts"] | allocated_at_peak(partial(step, state)))
            del state
            client.close_block()
        return result


def balance(total: int, parts: dict[str, int]) -> dict[str, Any]:
    rest = total - sum(parts.values())
    return {"bytes": total, "parts": dict(parts), "unexplained": round(rest / total, 4)}


def run(ranks: int, overrides: list[str], environment: dict[str, str], places: dict[int, bool]) -> dict[str, Any]:
    """One case in processes of its own; of several ranks, the first."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        asked = [",".join(f"{place}:{int(steps)}" for place, steps in places.items()), *overrides]
        run_apart(__file__, ranks, asked, environment | {"DECA_BENCHMARK": str(output)}, DEADLINE_S)
        return json.loads(output.read_text())


def main() -> None:
    results = []
    for name, *case in CASES:
        results.append({"case": name} | run(*case))
        for label, found in results[-1]["blocks"].items():
            print(f"{name}, {label}: {json.dumps(found)}", flush=True)
    target = REPOSITORY / "benchmarks" / "results" / "client_memory.json"
    target.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--")]  # the launcher adds --local_rank
    if words:
        asked = {int(place): steps == "1" for place, steps in (each.split(":") for each in words[0].split(","))}
        report = measure(asked, words[1:])
        if os.environ.get("RANK", "0") == "0":
            Path(os.environ["DECA_BENCHMARK"]).write_text(json.dumps(report))
    else:
        main()

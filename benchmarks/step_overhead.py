"""What an inner step without gossip costs over a bare forward and backward pass of the same engine.

    python benchmarks/step_overhead.py [key=value ...]                                      (one rank)
    deepspeed --num_accelerators 2 benchmarks/step_overhead.py [key=value ...]              (two ranks)

Three measurements alternate in one process, on the same batch and with the same active block, in the middle of a random
Llama:

    bare      gather (with one rank there is nothing), forward, loss, backward, release; gradients are dropped as soon
              as autograd has made them, so there is no reduction over the ranks
    gradient  bare, plus the gradient's reduction to float32 shards, token counts, norm and clipping
    step      gradient, plus Adam and the write-back: the trainer's inner step of a client without neighbours

Prints the medians and their ratios to the bare pass, by the clock and in CPU seconds of rank 0. On a busy machine the
CPU seconds are the steadier figure. With several ranks it also counts, for the largest block and buckets of BUCKET
elements: `buckets` of a backward pass, how many were `sent_in_backward`, by the end of its last hook of a gradient,
and the most gradients that a hook left `kept` for later.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import LlamaConfig

from deca_ds.algorithm.deca import DecaRule
from deca_ds.algorithm.schedule import Schedule
from deca_ds.config import load_config
from deca_ds.config.schema import GossipConfig
from deca_ds.engine import client as engine
from deca_ds.engine import internals
from deca_ds.engine.architecture import load_architecture
from deca_ds.engine.client import Client
from deca_ds.engine.load import load_model
from deca_ds.gossip.gossip import Gossip
from deca_ds.gossip.schedule import build_mixing
from deca_ds.launch import read_launch
from deca_ds.launch.store import open_job_store
from deca_ds.launch.world import connect
from deca_ds.training.step import inner_step
from deca_ds.transport.local import LocalNetwork
from deca_ds.watchdog.guard import guarded

REPETITIONS, WARM_UP = 15, 2
ROWS, LENGTH = 4, 256  # of a rank's batch
BUCKET = 2**18  # elements: many buckets in a small block
SHAPE = dict(vocab_size=4096, hidden_size=512, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=8)


def bare_pass(client: Client, batch: dict[str, torch.Tensor]) -> None:
    reducer = client._reducer
    assert reducer is not None
    reducer._take = lambda index, parameter: setattr(parameter, "grad", None)  # hides the method
    client.model.train()
    logits = client.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    F.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
    internals.partition_all(client._zero)
    del reducer._take


def timed(action: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds by the clock and of this process's CPU time."""
    dist.barrier()
    started, used = time.perf_counter(), time.process_time()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, time.process_time() - used


def measure(client: Client, block: int, device: torch.device) -> dict[str, Any]:
    """Median seconds of all three, interleaved, and their ratios to the bare pass, for one active block."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randint(0, SHAPE["vocab_size"], (ROWS, LENGTH), generator=generator).to(device)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    of_one = LocalNetwork([dist.get_world_size()]).transport(dist.get_rank())
    gossip = Gossip(of_one, build_mixing(GossipConfig(), 1, 0), GossipConfig().chunk_mib, device)
    first = Schedule(rounds=1, blocks=len(client.plan.blocks), inner_steps=1).step(0)
    options = load_config(None, ["model.path=x"]).optimizer
    state = client.open_block(block, DecaRule.buffers)
    actions: dict[str, Callable[[], object]] = {
        "bare": lambda: bare_pass(client, batch),
        "gradient": lambda: client.gradient([batch], options.clip_norm),
        "step": lambda: inner_step(client, state, DecaRule(), gossip, first, [batch], 1e-4, options),
    }
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in actions}
    names = list(actions)
    for repetition in range(WARM_UP + REPETITIONS):
        for name in names[repetition % 3 :] + names[: repetition % 3]:
            taken[name].append(timed(actions[name], device))
    client.close_block()
    result: dict[str, Any] = {"repetitions": REPETITIONS}
    for place, clock in enumerate(("seconds", "cpu_seconds")):
        values = {name: [pair[place] for pair in pairs[WARM_UP:]] for name, pairs in taken.items()}
        medians = {name: statistics.median(each) for name, each in values.items()}
        result[clock] = {name: round(value, 4) for name, value in medians.items()}
        for name in ("gradient", "step"):
            quotients = [x / y for x, y in zip(values[name], values["bare"], strict=True)]
            low, _, high = statistics.quantiles(quotients, n=4)
            result[f"{name}_{clock}_ratio"] = round(medians[name] / medians["bare"], 3)
            result[f"{name}_{clock}_ratio_quartiles"] = [round(low, 3), round(high, 3)]
    return result


def overlap(client: Client, device: torch.device) -> dict[str, int]:
    """What is sent while the backward pass runs, for the block with the most parameters of the plan."""
    numels = [sum(math.prod(client.shapes[name]) for name in block.names) for block in client.plan.blocks]
    index = max(range(len(numels)), key=numels.__getitem__)
    engine.BUCKET_NUMEL = BUCKET
    client.open_block(index, ())
    reducer = client._reducer
    assert reducer is not None
    ids = torch.randint(0, SHAPE["vocab_size"], (ROWS, LENGTH), generator=torch.Generator().manual_seed(0)).to(device)
    found = {"bucket_numel": BUCKET, "buckets": 0, "sent_in_backward": 0, "kept": 0}

    def look(*_: object) -> None:
        found["sent_in_backward"] = sends.call_count
        found["kept"] = max(found["kept"], len(reducer._turns.kept))

    parameters = (client._parameters[name] for name in client.plan.blocks[index].names)
    hooks = [parameter.register_post_accumulate_grad_hook(look) for parameter in parameters]
    with mock.patch.object(dist, "reduce_scatter_tensor", wraps=dist.reduce_scatter_tensor) as sends:
        client.gradient([{"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}])
        found["buckets"] = sends.call_count
    for hook in hooks:
        hook.remove()
    client.close_block()
    return found


def main() -> None:
    launch = read_launch()
    store = open_job_store(launch, 60)
    with guarded(launch, store), tempfile.TemporaryDirectory() as folder:
        LlamaConfig(**SHAPE).save_pretrained(folder)
        overrides = [argument for argument in sys.argv[1:] if "=" in argument and not argument.startswith("--")]
        config = load_config(
            None, [f"model.path={folder}", "model.init=random", "run.device=auto", "data.micro_batch_size=4",
                   "blocks.layers_per_block=1", *overrides]
        )  # fmt: skip
        cluster = connect(config, launch, store)
        client = Client(config, load_model(config, load_architecture(config.model)), cluster.device)
        block = len(client.plan.blocks) // 2
        result = measure(client, block, cluster.device)
        if cluster.ranks > 1:
            result["overlap"] = overlap(client, cluster.device)
        if cluster.is_job_leader:
            size = sum(math.prod(client.shapes[name]) for name in client.plan.blocks[block].names)
            about = {"ranks": cluster.ranks, "block": client.plan.blocks[block].label, "block_parameters": size}
            print(json.dumps(about | result), flush=True)


if __name__ == "__main__":
    main()

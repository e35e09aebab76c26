"""What an inner step without gossip costs over a bare forward and backward pass of the same engine.

    python benchmarks/step_overhead.py                                      (one rank)
    deepspeed --num_accelerators 2 benchmarks/step_overhead.py              (two ranks)

Both are timed in turn, in one process, on the same batch and the same active block of a random Llama. The bare pass is
what ZeRO-3 cannot do without: gather, forward, loss, backward, release; its gradients are dropped as soon as autograd
has made them. The step adds the gradient's reduction to float32 shards, its norm, Adam and the write-back. Prints the
medians and their ratio.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import LlamaConfig

from deca_ds.algorithm.deca import DecaRule
from deca_ds.algorithm.schedule import Schedule
from deca_ds.cluster import connect, read_launch
from deca_ds.cluster.guard import guarded
from deca_ds.cluster.store import open_job_store
from deca_ds.config import load_config
from deca_ds.config.schema import GossipConfig
from deca_ds.engine import internals
from deca_ds.engine.client import Client
from deca_ds.engine.load import load_architecture, load_model
from deca_ds.gossip.local import LocalNetwork
from deca_ds.gossip.mix import Gossip
from deca_ds.gossip.schedule import build_mixing
from deca_ds.training.step import inner_step

REPETITIONS, WARM_UP = 7, 1
ROWS, LENGTH = 4, 256  # of a rank's batch
SHAPE = dict(vocab_size=4096, hidden_size=512, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=8)


def bare_pass(client: Client, batch: dict[str, torch.Tensor]) -> None:
    client.model.train()
    logits = client.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    F.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
    internals.partition_all(client._zero)


def timed(action: Callable[[], object]) -> float:
    dist.barrier()
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def measure(client: Client, block: int, device: torch.device) -> dict[str, float]:
    """Median seconds of both, interleaved, and their ratio, for one active block."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randint(0, SHAPE["vocab_size"], (ROWS, LENGTH), generator=generator).to(device)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    gossip = Gossip(LocalNetwork(1).transport(0), build_mixing(GossipConfig(), 1, 0), 16.0, device)
    steps = Schedule(rounds=1, blocks=len(client.plan.blocks), inner_steps=10**6)
    options = load_config(None, ["model.path=x"]).optimizer
    names = set(client.plan.blocks[block].names)
    trained = [p for name, p in client.model.named_parameters() if name in names]

    def bare() -> None:
        for parameter in trained:
            parameter.requires_grad_(True)
        hooks = [p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)) for p in trained]
        internals.forget_trace(client._zero)
        times["bare"] += [timed(lambda: bare_pass(client, batch)) for _ in range(WARM_UP + 1)][WARM_UP:]
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.requires_grad_(False)

    def step() -> None:
        state = client.open_block(block)
        run = lambda: inner_step(client, state, DecaRule(), gossip, steps.step(0), [batch], 1e-4, options)  # noqa: E731
        times["step"] += [timed(run) for _ in range(WARM_UP + 1)][WARM_UP:]
        client.close_block()

    times: dict[str, list[float]] = {"bare": [], "step": []}
    for repetition in range(REPETITIONS):
        for action in (bare, step) if repetition % 2 else (step, bare):
            action()
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "bare_s": medians["bare"],
        "step_s": medians["step"],
        "ratio": medians["step"] / medians["bare"],
        "ratio_of_minima": min(times["step"]) / min(times["bare"]),
    }


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
        for block in (0, len(client.plan.blocks) // 2, len(client.plan.blocks) - 1):
            result = measure(client, block, cluster.device)
            if cluster.is_main:
                label = client.plan.blocks[block].label
                print(json.dumps({"ranks": cluster.ranks, "block": label, **result}), flush=True)


if __name__ == "__main__":
    main()

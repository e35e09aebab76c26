"""Checks of one client's engine, run on every one of its ranks; writes what it measured.

Usage: engine_worker.py key=value ... The environment's FOUND names the file, of JSON.
"""

import gc
import json
import math
import os
import sys
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from deca_ds.config import load_config
from deca_ds.engine import internals
from deca_ds.engine.architecture import load_architecture
from deca_ds.engine.client import Client
from deca_ds.engine.load import load_model
from deca_ds.engine.losses import training_loss
from deca_ds.launch import read_launch
from deca_ds.launch.store import open_job_store
from deca_ds.launch.world import connect
from deca_ds.watchdog.guard import guarded

SWITCHES = {2: 100}  # ranks -> block switches that memory is watched over; fewer elsewhere, to save time


def batch_of(rank: int, ranks: int) -> dict[str, torch.Tensor]:
    """This rank's rows of a fixed batch of six."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 44, (6, 9), generator=generator)
    labels = ids.clone()
    labels[0, :5] = -100  # rows with different numbers of targets: a mean of means would differ
    rows = slice(rank * 6 // ranks, (rank + 1) * 6 // ranks)
    return {"input_ids": ids[rows], "labels": labels[rows], "attention_mask": torch.ones_like(ids[rows])}


def live_tensors() -> int:
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


def gathered_during_backward(client: Client, batch: dict) -> int:
    """Most parameters that are whole at once when a gradient of the active block arrives."""
    most = 0

    def look(*_):
        nonlocal most
        most = max(most, sum(1 for _ in internals.gathered(client.model)))

    hooks = [p.register_post_accumulate_grad_hook(look) for p in client.model.parameters() if p.requires_grad]
    client.gradient([batch])
    for hook in hooks:
        hook.remove()
    return most


def layers_in_backward(client: Client, batch: dict) -> list[bool]:
    """For each layer, whether its input takes part in the backward pass."""
    entered: list[bool] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0].requires_grad))
        for layer in client.model.model.layers
    ]
    client.gradient([batch])
    for hook in hooks:
        hook.remove()
    return entered[: len(client.model.model.layers)]


def unlike_plain(client: Client, path: str) -> list[str]:
    """Parameters of which a client of one rank has another gradient than the model outside of DeepSpeed, by any bit."""
    batch = batch_of(0, 1)
    plain = AutoModelForCausalLM.from_pretrained(path).train()
    parameters = dict(plain.named_parameters())
    for parameter in parameters.values():
        parameter.data = parameter.data.clone()  # at an address like a shard's: some processors add up by alignment
    differ = []
    for index, block in enumerate(client.plan.blocks):
        client.open_block(index, ())
        targets = client.gradient([batch]).targets
        found = {name: state["grad"].clone() for name, _, _, state in client.block_shards()}
        client.close_block()
        plain.requires_grad_(False)
        for name in block.names:
            parameters[name].requires_grad_(True)
        training_loss(plain, batch, client.device, targets).backward()
        differ += [name for name in block.names if not torch.equal(found[name], parameters[name].grad.view(-1))]
        plain.zero_grad()
    return differ


def hooks(model: torch.nn.Module) -> int:
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def passes_that_follow_writes(client: Client, batch: dict) -> list[bool]:
    """For each way to run the model, whether its first gather waits for what was written to shards."""
    follow, seen = internals.follow_writes, []
    internals.follow_writes = lambda zero: (seen.append("follow"), follow(zero))
    hook = client.model.register_forward_pre_hook(lambda *_: seen.append("pass"))
    first = []
    for run in (client.check_loss, client.score, lambda batch: client.gradient([batch])):
        seen.clear()
        run(batch)
        client.end_scoring()
        assert "pass" in seen
        first.append(seen[0] == "follow")
    hook.remove()
    internals.follow_writes = follow
    return first


def check(client: Client, rank: int, ranks: int, vocabulary: int) -> dict:
    batch = batch_of(rank, ranks)
    found: dict = {"parameters": len(client.shapes), "hooks": hooks(client.model)}

    # gradients and norm of every block; nothing stays gathered
    found["norms"], found["losses"], found["left_gathered"], found["gradient_sums"] = [], [], 0, []
    for index in range(len(client.plan.blocks)):
        state = client.open_block(index, ("m", "v"))
        stats = client.gradient([batch])
        found["norms"].append(stats.norm)
        found["losses"].append(stats.loss)
        found["gradient_sums"].append(client.client_sum(float(state.grad.double().sum())))
        found["left_gathered"] += sum(1 for _ in internals.gathered(client.model))
        halves = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(len(batch["input_ids"]))]
        ticks: list[None] = []
        accumulated = client.gradient(halves, tick=lambda: ticks.append(None))  # noqa: B023
        assert len(ticks) == len(halves)
        found["losses"].append(accumulated.loss)
        found["norms"].append(accumulated.norm)
        clipped = client.gradient([batch], clip_norm=stats.norm / 2)
        norm = client.client_sum(float(state.grad.double().square().sum())) ** 0.5
        found.setdefault("clipped", []).append(norm / clipped.norm)
        client.close_block()

    # after the first block another one: the old trace must not linger, and lower layers must not be visited
    client.open_block(0, ("m", "v"))
    for _ in range(3):
        client.gradient([batch])
    client.close_block()
    client.open_block(2, ("m", "v"))
    client.gradient([batch])
    found["gathered_in_backward"] = gathered_during_backward(client, batch)
    found["layers_in_backward"] = layers_in_backward(client, batch)
    found["follow_writes"] = passes_that_follow_writes(client, batch)
    client.close_block()

    # memory over many switches
    def switch(count: int) -> None:
        for i in range(count):
            state = client.open_block(i % len(client.plan.blocks), ("m", "v"))
            client.gradient([batch])
            state.theta.sub_(state.grad, alpha=0.0)
            client.write_back()
            client.close_block()

    switch(20)
    process = psutil.Process()
    before = live_tensors(), process.memory_info().rss
    switch(SWITCHES.get(ranks, 20))
    after = live_tensors(), process.memory_info().rss
    found["tensors_grown"], found["rss_grown"] = after[0] - before[0], after[1] - before[1]

    # what is written to shards is what the next forward pass sees, and borrowed shards come back
    names = list(client.shapes)
    original = client.score(batch)[0].sum()
    client.end_scoring()
    with client.borrowed_shards(names) as shards:
        for values, _ in shards:
            values.zero_()
        losses, _, counts = client.score(batch)
        found["uniform_loss"] = float(losses.sum() / counts.sum()) / math.log(vocabulary)
        client.end_scoring()
    found["restored"] = float(client.score(batch)[0].sum() - original)
    client.end_scoring()
    covered = sum(stop - start for _, start, stop, _ in client.shards(names))
    found["covered"] = int(client.client_sum(covered))
    found["elements"] = sum(math.prod(shape) for shape in client.shapes.values())
    return found


def main() -> None:
    config = load_config(None, ["run.device=cpu", "run.threads=1", "blocks.layers_per_block=1",
                                *(a for a in sys.argv[1:] if not a.startswith("--"))])  # fmt: skip
    launch = read_launch()
    store = open_job_store(launch, 60)
    with guarded(launch, store):
        cluster = connect(config, launch, store)
        architecture = load_architecture(config.model)
        client = Client(config, load_model(config, architecture), cluster.device)
        found = {} if cluster.ranks > 1 else {"unlike_plain": unlike_plain(client, config.model.path)}
        found |= check(client, cluster.shard, cluster.ranks, architecture.vocab_size)
        dist.barrier()
        if cluster.is_job_leader:
            Path(os.environ["FOUND"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()

"""The measurements of gpu_acceptance.py that need no job of several processes; prints what was measured as JSON.

    python benchmarks/acceptance_worker.py hardware|engine|memory [--small]

Without --small it needs a GPU. One rank, one client.
"""

from __future__ import annotations

import gc
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from transformers import LlamaConfig

from deca_ds.algorithm.deca import DecaRule
from deca_ds.algorithm.schedule import Schedule
from deca_ds.config import load_config
from deca_ds.config.schema import Config, GossipConfig
from deca_ds.engine import internals
from deca_ds.engine.architecture import load_architecture
from deca_ds.engine.client import BlockState, Client
from deca_ds.engine.load import load_model
from deca_ds.gossip.gossip import Gossip
from deca_ds.gossip.schedule import build_mixing
from deca_ds.launch import read_launch
from deca_ds.launch.store import open_job_store
from deca_ds.launch.world import connect
from deca_ds.training.step import inner_step
from deca_ds.transport.checksums import checksum
from deca_ds.transport.local import LocalNetwork
from deca_ds.watchdog.guard import guarded

TINY = dict(
    vocab_size=512, hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=False,
)  # fmt: skip
LLAMA_2_7B = dict(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    max_position_embeddings=4096, tie_word_embeddings=False,
)  # fmt: skip
SLEEP_CYCLES = 300_000_000  # of the GPU's clock: about 0.2 s


def hardware(small: bool) -> dict[str, Any]:
    """What the machine can do at most: a bf16 product, copies between host and GPU, the checksum of messages."""
    device = torch.device("cpu" if small else "cuda")
    n, repetitions = (256, 3) if small else (8192, 20)
    a = torch.randn(n, n, dtype=torch.bfloat16, device=device)
    seconds = _median_seconds(lambda: a @ a, device, repetitions)
    found = {"product_tflops": 2 * n**3 / seconds / 1e12, "product_size": n}
    host = torch.randn((2**18 if small else 2**28) // 4, pin_memory=not small)
    if not small:
        on_gpu = host.to(device)
        found["to_host_gb_s"] = host.nbytes / _median_seconds(lambda: host.copy_(on_gpu), device, 5) / 1e9
        found["to_gpu_gb_s"] = host.nbytes / _median_seconds(lambda: on_gpu.copy_(host), device, 5) / 1e9
        found["gpu"] = torch.cuda.get_device_name(device)
        found["gpu_gib"] = torch.cuda.get_device_properties(device).total_memory / 2**30
    found["checksum_gb_s"] = host.nbytes / _median_seconds(lambda: checksum(host), torch.device("cpu"), 5) / 1e9
    return found


def engine(small: bool) -> dict[str, Any]:
    """Of a small bf16 model: whether what `write_back` writes is what the next forward pass reads, on a GPU also when
    the write is late; and whether a block's masters come back as they were when it opens again."""
    options = ["model.dtype=bfloat16", f"run.device={'cpu' if small else 'cuda'}"]
    hooks_stay = patch.object(internals, "keep_shards_whole", lambda engine: False)
    with hooks_stay, _client(TINY, options) as (client, config), _gathers() as gathers:
        batch = _batch(client, 2, 32)
        state = client.open_block(1, DecaRule.buffers)
        _train(client, config, state, batch, 3)
        found: dict[str, Any] = {"device": str(client.device)}
        found["late_write_is_read"] = _late_write_is_read(client, state, batch, gathers)
        with patch.object(internals, "follow_writes", lambda zero: None):  # or the check above could not fail
            found["late_write_is_read_without_waiting"] = _late_write_is_read(client, state, batch, gathers)
        _train(client, config, state, batch, 3)
        before = state.theta.clone()
        client.close_block()
        client.open_block(0, DecaRule.buffers)
        client.close_block()
        after = client.open_block(1, DecaRule.buffers).theta
        rounded = before.to(torch.bfloat16).float()
        found["masters_come_back"] = bool(torch.equal(before, after))
        found["masters_that_rounding_would_change"] = float((before != rounded).float().mean())
        client.close_block()
    return found


def _late_write_is_read(
    client: Client, state: BlockState, batch: dict[str, torch.Tensor], gathers: Sequence[tuple[int, ...]]
) -> bool:
    """Whether a forward pass reads what `write_back` has just been asked to write, on a GPU a while later."""
    state.theta.mul_(1.5)
    if client.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda._sleep(SLEEP_CYCLES)  # what follows on this stream is late
    client.write_back()
    before = len(gathers)
    late = client.score(batch)[0]
    assert set(client.shapes.values()) <= set(gathers[before:]), "the forward pass did not gather the model"
    client.end_scoring()
    if client.device.type == "cuda":
        torch.cuda.synchronize()
    settled = client.score(batch)[0]
    client.end_scoring()
    return bool(torch.equal(late, settled))


def memory(small: bool) -> dict[str, Any]:
    """Memory and speed of one client of 7 billion parameters in bf16, blocks of two layers, the middle block active."""
    shape, rows, length = (TINY, 2, 32) if small else (LLAMA_2_7B, 4, 2048)
    options = ["model.dtype=bfloat16", "blocks.layers_per_block=2", "model.gradient_checkpointing=true"]
    with _client(shape, [*options, f"run.device={'cpu' if small else 'cuda'}"]) as (client, config):
        index = len(client.plan.blocks) // 2
        block = client.plan.blocks[index]
        numel = {name: math.prod(shape) for name, shape in client.shapes.items()}
        order = [name for each in client.plan.blocks for name in each.names]
        above = sum(numel[name] for name in order[order.index(block.names[-1]) + 1 :])
        model_bytes, block_bytes = 2 * sum(numel.values()), 2 * block.numel
        found: dict[str, Any] = {
            "parameters": sum(numel.values()), "block_parameters": block.numel, "parameters_above": above,
            "model_bytes": model_bytes, "block_bytes": block_bytes, "device": str(client.device),
        }  # fmt: skip
        state = client.open_block(index, DecaRule.buffers)
        if client.device.type == "cuda":
            gc.collect()
            torch.cuda.synchronize()
            found["at_rest_bytes"] = torch.cuda.memory_allocated()
            # what depends on the tokens is activations; the rest is what a step takes whatever its batch
            found["peak_bytes_by_length"] = {
                part: _peak(lambda part=part: _train(client, config, state, _batch(client, rows, part), 1))
                for part in (length // 4, length // 2, length)
            }
            found["reserved_bytes"] = torch.cuda.max_memory_reserved()
        batch = _batch(client, rows, length)
        _train(client, config, state, batch, 1)
        seconds = _median_seconds(lambda: _train(client, config, state, batch, 1), client.device, 2 if small else 5)
        tokens = rows * length
        forward_and_backward = found["parameters"] + above + 2 * block.numel
        recomputed = above + block.numel
        found |= {
            "seconds_per_step": seconds, "tokens_per_second": tokens / seconds,
            "tflops": 2 * tokens * (forward_and_backward + recomputed) / seconds / 1e12,
        }  # fmt: skip
        client.close_block()
    return found


def _train(client: Client, config: Config, state: BlockState, batch: dict[str, torch.Tensor], steps: int) -> None:
    gossip = Gossip(LocalNetwork(1).transport(0), build_mixing(GossipConfig(), 1, 0), device=client.device)
    schedule = Schedule(rounds=1, blocks=1, inner_steps=steps)
    for step in range(steps):
        inner_step(client, state, DecaRule(), gossip, schedule.step(step), [batch], 1e-4, config.optimizer)


def _batch(client: Client, rows: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 500, (rows, length), generator=torch.Generator().manual_seed(0)).to(client.device)
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def _peak(action: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    action()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def _median_seconds(action: Callable[[], object], device: torch.device, repetitions: int) -> float:
    taken = []
    for _ in range(repetitions + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


@contextmanager
def _gathers() -> Iterator[list[tuple[int, ...]]]:
    """Have ZeRO-3 gather the parameters of a client of one rank into new memory, on its own stream, as with several
    ranks; by itself it takes the shards. Yields the shapes of what has been gathered."""
    # DeepSpeed chooses its accelerator when it is imported: not before the client has its device
    from deepspeed.runtime.zero import partition_parameters

    gathered: list[tuple[int, ...]] = []
    take_shards = partition_parameters._no_gather_coalesced

    def copy_shards(parameters: Iterable[Any]) -> Any:
        handle = take_shards(parameters)
        for parameter in parameters:
            parameter.data = parameter.data.clone()
            gathered.append(tuple(parameter.shape))
        return handle

    with patch.object(partition_parameters, "_no_gather_coalesced", copy_shards):
        yield gathered


@contextmanager
def _client(shape: dict[str, Any], overrides: list[str]) -> Iterator[tuple[Client, Config]]:
    launch = read_launch()
    store = open_job_store(launch, 60)
    with guarded(launch, store), tempfile.TemporaryDirectory() as folder:
        LlamaConfig(**shape).save_pretrained(folder)
        base = [
            f"model.path={folder}",
            "model.init=random",
            "run.threads=1",
            "blocks.layers_per_block=1",
            "data.micro_batch_size=4",
        ]
        config = load_config(None, [*base, *overrides])
        cluster = connect(config, launch, store)
        yield Client(config, load_model(config, load_architecture(config.model)), cluster.device), config
        cluster.close_world()


if __name__ == "__main__":
    measurements = {"hardware": hardware, "engine": engine, "memory": memory}
    print(json.dumps(measurements[sys.argv[1]]("--small" in sys.argv)), flush=True)

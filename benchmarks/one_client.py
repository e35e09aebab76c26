"""One client on a random Llama, as the trainer has it, for benchmarks that look at its memory and its steps."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from deca_ds.algorithm.rule import Rule
from deca_ds.algorithm.schedule import Schedule
from deca_ds.config import load_config
from deca_ds.config.schema import Config, GossipConfig
from deca_ds.engine.architecture import load_architecture
from deca_ds.engine.client import BlockState, Client
from deca_ds.engine.load import load_model
from deca_ds.gossip.gossip import Gossip
from deca_ds.gossip.schedule import build_mixing
from deca_ds.launch import read_launch
from deca_ds.launch.store import open_job_store
from deca_ds.launch.world import connect
from deca_ds.training.step import inner_step
from deca_ds.transport.local import LocalNetwork
from deca_ds.watchdog.guard import guarded

Make = Callable[[dict[str, Any], Sequence[str]], tuple[Config, Client]]


@contextmanager
def one_client() -> Iterator[Make]:
    """make(shape, overrides): the client of all ranks that were launched, on the CPU with one thread, blocks of one
    layer."""
    launch = read_launch()
    store = open_job_store(launch, 60)
    base = ["model.init=random", "run.device=cpu", "run.threads=1", "blocks.layers_per_block=1"]
    with guarded(launch, store), tempfile.TemporaryDirectory() as folder:
        cluster = connect(load_config(None, [*base, "model.path=none"]), launch, store)

        def make(shape: dict[str, Any], overrides: Sequence[str]) -> tuple[Config, Client]:
            LlamaConfig(**shape).save_pretrained(folder)
            config = load_config(None, [*base, f"model.path={folder}", *overrides])
            return config, Client(config, load_model(config, load_architecture(config.model)), cluster.device)

        yield make


def random_batch(shape: dict[str, Any], rows: int, length: int) -> dict[str, Tensor]:
    """The same random tokens whenever it is called."""
    ids = torch.randint(0, shape["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def lonely_step(config: Config, client: Client, rule: Rule, batch: dict[str, Tensor]) -> Callable[[BlockState], float]:
    """The trainer's inner step of a client without neighbours, which returns the loss; learning rate 1e-4."""
    of_one = LocalNetwork([torch.distributed.get_world_size()]).transport(torch.distributed.get_rank())
    gossip = Gossip(of_one, build_mixing(GossipConfig(), 1, 0))
    first = Schedule(rounds=1, blocks=len(client.plan.blocks), inner_steps=1).step(0)
    return lambda state: inner_step(client, state, rule, gossip, first, [batch], 1e-4, config.optimizer).loss

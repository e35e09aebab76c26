"""The dense reference of a run, from the run's configuration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import TypeAlias

import numpy as np
import torch
from dense_reference import Coefficients, Parameters, train
from rounding import Noise, assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from deca_ds.checkpoint.shards import ShardedModel
from deca_ds.config import Config
from deca_ds.data import load_client_data, training_batches


def batches_of(config: Config) -> list[Iterator[dict]]:
    """Every client's batches."""
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    batches = []
    for client in range(config.cluster.clients):
        data = load_client_data(config, tokenizer, client)
        steps = training_batches(
            data.train, batch_size=4, micro_batch_size=4, rank=0, ranks=1, seed=config.run.seed, client=client, pad_id=0
        )
        batches.append(step[0] for step in steps)
    return batches


def dense_model(config: Config) -> tuple[torch.nn.Module, list[list[str]]]:
    """In float64, and the names in its blocks."""
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float64)
    names = [name for name, _ in model.named_parameters()]
    layer = lambda *indices: [n for n in names if any(f".layers.{i}." in n for i in indices)]  # noqa: E731
    blocks = [["model.embed_tokens.weight"], layer(0, 1), layer(2), ["model.norm.weight", "lm_head.weight"]]
    if config.blocks.layers_per_block is None:
        blocks = [sum(blocks, [])]
    assert sorted(sum(blocks, [])) == sorted(names)
    return model, blocks


def rates(config: Config, steps: int) -> np.ndarray:
    """The learning rate of each inner step of a run without a warm-up."""
    course = {"constant": np.ones(steps), "cosine": np.cos(np.pi / 2 * np.arange(steps) / steps) ** 2}
    return config.optimizer.lr * course[config.optimizer.schedule]


Reference: TypeAlias = tuple[Parameters, Sequence[Parameters], Sequence[Parameters]]


def dense(config: Config, matrices: Sequence[np.ndarray]) -> Reference:
    """Every client's parameters before training; after it, client by client; and these with noise (rounding.py).

    matrices: of the averagings, again and again.
    """
    model, blocks = dense_model(config)
    start = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    a, o = config.algorithm, config.optimizer
    keys = {field.name: getattr(a, field.name) for field in fields(Coefficients) if hasattr(a, field.name)}
    coefficients = Coefficients(**keys, clip_radius=config.gossip.clip_radius)
    course = rates(config, a.rounds * len(blocks) * a.inner_steps)
    exact, noisy = (
        train(
            coefficients, model, blocks, batches_of(config), matrices, rounds=a.rounds, inner_steps=a.inner_steps,
            every=config.gossip.every, rates=course, decay=o.weight_decay, clip=o.clip_norm, noise=noise,
        )
        for noise in (None, Noise())
    )  # fmt: skip
    return start, exact, noisy


def assert_dense(saved: ShardedModel, reference: Reference, where: str) -> None:
    """Every client's model is the dense reference's to rounding, and all of it has been trained."""
    start, exact, noisy = reference
    for client in exact:
        for name, values in start.items():
            assert not np.allclose(client[name], values, atol=1e-4), f"{where}: {name} is never trained"
    got = [{name: saved.read(name, client) for name in start} for client in range(len(exact))]
    assert_close(got, exact, noisy, start, where)

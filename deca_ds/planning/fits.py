"""The nearest setting that fits where the configured one does not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

from deca_ds.algorithm.methods import METHODS
from deca_ds.config import Config

Change = tuple[Config, int, str]  # the configuration, the ranks of a client, and what is another


def neighbours(config: Config, ranks: int) -> Iterator[Change]:
    """Settings near to a configuration, the least intrusive first: those that change no number of what is trained, then
    more ranks a client, then smaller blocks. Each is one change, and all those before it that it needs not undo."""
    told: list[str] = []
    now = copy.deepcopy(config)
    while now.data.micro_batch_size > 1:
        now = copy.deepcopy(now)
        now.data.micro_batch_size = max(1, now.data.micro_batch_size // 2)
        yield now, ranks, f"data.micro_batch_size={now.data.micro_batch_size}"
    if now.data.micro_batch_size != config.data.micro_batch_size:
        told.append(f"data.micro_batch_size={now.data.micro_batch_size}")
    if not now.model.gradient_checkpointing:
        now = copy.deepcopy(now)
        now.model.gradient_checkpointing = True
        if told:
            alone = copy.deepcopy(config)
            alone.model.gradient_checkpointing = True
            yield alone, ranks, "model.gradient_checkpointing=true"
        told.append("model.gradient_checkpointing=true")
        yield now, ranks, " ".join(told)
    if now.evaluation.batch_size > 1:
        now = copy.deepcopy(now)
        now.evaluation.batch_size = 1
        told.append("evaluation.batch_size=1")
        yield now, ranks, " ".join(told)
    if now.blocks.layers_per_block not in (1, None) and METHODS[now.algorithm.method].whole_model is not True:
        smaller = copy.deepcopy(now)
        smaller.blocks.layers_per_block = 1
        yield smaller, ranks, " ".join([*told, "blocks.layers_per_block=1"])
    for more in (2, 4, 8, 16):
        if more > ranks and now.data.batch_size % (more * now.data.micro_batch_size) == 0:
            yield now, more, " ".join([*told, f"with {more} ranks a client"])
    if now.model.dtype == "float32":
        now = copy.deepcopy(now)
        now.model.dtype = "bfloat16"
        for more in (1, 2, 4, 8):
            if more >= ranks and now.data.batch_size % (more * now.data.micro_batch_size) == 0:
                with_ranks = [f"with {more} ranks a client"] if more > ranks else []
                yield now, more, " ".join([*told, "model.dtype=bfloat16", *with_ranks])


def nearest(config: Config, ranks: int, fits: Callable[[Config, int], bool]) -> Change | None:
    """The first of `neighbours` that fits, or None."""
    return next((change for change in neighbours(config, ranks) if fits(change[0], change[1])), None)

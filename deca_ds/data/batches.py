"""Batches of token sequences for the ranks of one client."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from torch.utils.data import BatchSampler, DataLoader, Sampler

from deca_ds.data.encoding import IGNORED
from deca_ds.errors import ConfigError

Tensors = dict[str, torch.Tensor]
_PART = 1000  # indices that are numbers of Python's at a time


def training_batches(
    train: Dataset,
    *,
    batch_size: int,
    micro_batch_size: int,
    rank: int,
    ranks: int,
    seed: int,
    client: int,
    pad_id: int,
    start_step: int = 0,
) -> Iterator[list[Tensors]]:
    """Yield, for every inner step from `start_step` on, without end, the micro-batches of rank `rank` of the client's
    `ranks`.

    A step takes the next batch_size sequences of an order that is shuffled anew every epoch from (seed, client, epoch);
    batches run across the ends of epochs. Neither `ranks` nor `micro_batch_size` changes which sequences a step has.
    A micro-batch is {"input_ids", "attention_mask", "labels"}, int64 [micro_batch_size, longest sequence in it], padded
    on the right with pad_id, 0 and -100. Raises ConfigError if batch_size is no multiple of micro_batch_size * ranks.
    """
    if batch_size % (micro_batch_size * ranks):
        raise ConfigError(
            f"data.batch_size = {batch_size} cannot be split over {ranks} ranks in micro-batches of {micro_batch_size}",
            where="data.batch_size, data.micro_batch_size",
            fix=f"choose a batch size that is a multiple of {micro_batch_size * ranks}",
        )

    def collate(rows: Sequence[Mapping[str, Any]]) -> list[Tensors]:
        starts = range(0, len(rows), micro_batch_size)
        return [_padded(rows[start : start + micro_batch_size], pad_id) for start in starts]

    order = _EndlessSampler(len(train), seed=seed, client=client, start=start_step * batch_size)
    whole_steps = BatchSampler(order, batch_size, drop_last=True)
    of_rank = BatchSamplerShard(whole_steps, num_processes=ranks, process_index=rank, split_batches=True)
    # A generator of its own: DataLoader draws from the global one otherwise, and a resumed run would differ.
    return iter(DataLoader(train, batch_sampler=of_rank, collate_fn=collate, generator=torch.Generator()))


def evaluation_batches(
    dataset: Dataset, *, batch_size: int, rank: int, ranks: int, pad_id: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the rows of an evaluation set, each exactly once over all ranks, in equally many batches on every rank.

    A batch is {"input_ids", "attention_mask", "labels"}, int64 [batch_size, longest], and "row", int64 [batch_size]:
    the row's index in `dataset`, or -1 for a filler row, all of whose labels are -100. Longest rows come first, so that
    a lack of memory shows at once.
    """
    lengths = pc.list_value_length(dataset.with_format("arrow")["input_ids"][:]).to_numpy()
    order = np.argsort(-lengths, kind="stable").tolist()
    for start in range(0, len(order), batch_size * ranks):
        first = start + rank * batch_size
        rows = order[first : first + batch_size]
        filler = batch_size - len(rows)
        batch = _padded([dataset[row] for row in rows + [order[-1]] * filler], pad_id)
        batch["labels"][len(rows) :] = IGNORED
        batch["row"] = torch.tensor(rows + [-1] * filler)
        yield batch


class _EndlessSampler(Sampler[int]):
    """Yields the indices of epoch after epoch, each in an order of its own, from the `start`-th on; takes 8 bytes of
    memory a row."""

    def __init__(self, rows: int, *, seed: int, client: int, start: int):
        # Mixed, because epoch e is seeded with seed + e: neighbouring seeds would share their orders.
        self.rows, self.seed = rows, int(np.random.SeedSequence([seed, client]).generate_state(1)[0])
        self.first_epoch, self.skipped = divmod(start, rows)

    def __iter__(self) -> Iterator[int]:
        skipped = self.skipped
        for epoch in count(self.first_epoch):
            order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(self.seed + epoch))
            for part in order[skipped:].split(_PART):
                yield from part.tolist()
            skipped = 0


def _padded(rows: Sequence[Mapping[str, Any]], pad_id: int) -> Tensors:
    longest = max(len(row["input_ids"]) for row in rows)
    shape = (len(rows), longest)
    batch = {
        "input_ids": torch.full(shape, pad_id, dtype=torch.int64),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
        "labels": torch.full(shape, IGNORED, dtype=torch.int64),
    }
    for place, row in enumerate(rows):
        length = len(row["input_ids"])
        batch["input_ids"][place, :length] = torch.tensor(row["input_ids"])
        batch["attention_mask"][place, :length] = 1
        batch["labels"][place, :length] = torch.tensor(row["labels"])
    return batch

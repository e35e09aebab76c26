"""Whether all clients start from the same data, as far as counts and labels tell, and from the same model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from deca_ds.engine.client import Client
from deca_ds.errors import DataError
from deca_ds.launch import ClientLayout
from deca_ds.launch.digests import digest

PIECE = 2**20  # elements that are worked on at a time
_GOLDEN, _FIRST, _SECOND = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def compare_data(summaries: Sequence[dict[str, Any]], label_names: Sequence[list[str]]) -> None:
    """Raise DataError unless all clients number the same labels alike and hold equally large common evaluation sets."""
    first = summaries[0]["client"]
    for summary, names in zip(summaries, label_names, strict=True):
        client = summary["client"]
        if names != label_names[0]:
            raise DataError(
                f"client {first} has the labels {label_names[0]}, client {client} has {names}",
                where="data.label_names",
                fix="name all labels in data.label_names, so that every client knows the same ones",
            )
        if summary["common_evaluation"] != summaries[0]["common_evaluation"]:
            raise DataError(
                f"the common evaluation set has {summaries[0]['common_evaluation']} examples at client {first} and "
                f"{summary['common_evaluation']} at client {client}",
                where="data.evaluation",
                fix="give every client the same files",
            )


def digest_of_start(client: Client, layout: ClientLayout) -> str:
    """Return a digest of the initial parameters and buffers that this rank holds; where clients differ in size, of the
    whole client, the same on all of its ranks."""
    if not layout.even:
        return _digest_of_slices(client)
    names = tuple(name for block in client.plan.blocks for name in block.names) + client.plan.frozen
    held = [values for *_, values in client.shards(names)]
    held += [bits for *_, bits in client.low_bits(names)]
    held += [buffer for _, buffer in client.buffers()]
    return digest(_memory(values) for values in held)


def _memory(values: torch.Tensor) -> memoryview:
    """Return the memory of a tensor, or of its copy on the host."""
    flat = values.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data


def _digest_of_slices(client: Client) -> str:
    """Return a digest of the client's parameters, with what rounding took from their masters, and buffers. It is equal
    for any number of ranks; all ranks of the client call this.

    No two ranks of clients of different sizes hold the same slices, so it is put together from slices of any size:

        sum_i w_i b_i  mod 2^64        b_i: the bits of element i as a whole number, w_i: pseudo-random of name and i

    As w_i is odd, another value of one element changes it for sure. It is no defence against intent.
    """
    names = tuple(name for block in client.plan.blocks for name in block.names) + client.plan.frozen
    total = 0
    described = []
    for name, start, _, values in client.shards(names):
        described.append(f"{name} {client.shapes[name]} {values.dtype}")
        total += weighted_sum(name, start, values)
    total += sum(weighted_sum(f"low bits of {name}", start, bits) for name, start, bits in client.low_bits(names))
    for name, buffer in client.buffers():  # whole on every rank
        described.append(f"{name} {weighted_sum(name, 0, buffer.reshape(-1))}")
    halves = [total % 2**32, total % 2**64 >> 32]
    summed = torch.tensor(halves, dtype=torch.int64, device=client.device)
    dist.all_reduce(summed)
    low, high = summed.tolist()
    return digest([str((low + (high << 32)) % 2**64).encode(), "\n".join(described).encode()])


def weighted_sum(name: str, start: int, values: torch.Tensor) -> int:
    """Return sum_i w_i b_i mod 2^64 of a 1-D slice whose first element is number `start` of the flat tensor `name`."""
    seed = np.frombuffer(hashlib.blake2b(name.encode(), digest_size=8).digest(), dtype=np.uint64)
    total = 0
    for first in range(0, values.numel(), PIECE):
        piece = values[first : first + PIECE].detach().cpu().contiguous()
        bits = piece.view(torch.uint8).numpy().view(f"u{piece.element_size()}").astype(np.uint64)
        total += int((bits * _weights(seed, start + first, len(bits))).sum(dtype=np.uint64))
    return total % 2**64


def _weights(seed: npt.NDArray[np.uint64], start: int, count: int) -> npt.NDArray[np.uint64]:
    """Return odd numbers that depend on seed and position (splitmix64: Steele, Lea, Flood, OOPSLA 2014)."""
    z: npt.NDArray[np.uint64] = np.arange(start, start + count, dtype=np.uint64) * _GOLDEN + seed
    z = (z ^ (z >> np.uint64(30))) * _FIRST
    z = (z ^ (z >> np.uint64(27))) * _SECOND
    odd: npt.NDArray[np.uint64] = (z ^ (z >> np.uint64(31))) | np.uint64(1)
    return odd

"""Exchange a chunk between clients: every rank gets what it holds of the chunk, packed if that is not contiguous."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from deca_ds.transport.checksums import Exchange
from deca_ds.transport.intersections import Chunk, Range
from deca_ds.transport.transport import Transport


def exchange_chunk(
    transport: Transport,
    chunk: Chunk,
    send: Tensor,
    destinations: Sequence[int],
    receives: Mapping[int, Tensor],
    tag: int,
) -> Exchange:
    """Start sending this rank's part of a chunk to the ranks of each client in `destinations`, and receiving what the
    ranks of each source client hold of it into that client's buffer. See Transport.exchange.

    send: 1-D, chunk.numel elements. receives: by client, buffers like `send`. Ranks that hold the same ranges share one
    exchange; between clients of one size nothing is copied.
    """
    assert send.shape == (chunk.numel,), f"{tuple(send.shape)} is not the part of {chunk.numel} elements"
    buffers: dict[int, Tensor] = {}
    packed: list[tuple[Tensor, Tensor, Sequence[Range]]] = []
    for j, buffer in receives.items():
        for rank, ranges in transport.routes.meets(chunk, j):
            if len(ranges) == 1:
                buffers[rank] = buffer[slice(*ranges[0])]
            else:
                buffers[rank] = torch.empty(sum(b - a for a, b in ranges), dtype=buffer.dtype)
                packed.append((buffers[rank], buffer, ranges))
    alike: dict[tuple[Range, ...], list[int]] = {}
    for j in destinations:
        for rank, ranges in transport.routes.meets(chunk, j):
            alike.setdefault(tuple(ranges), []).append(rank)
    started = []
    for ranges, ranks in alike.items() or [(((0, 0),), [])]:
        parts = [send[a:b] for a, b in ranges]
        values = parts[0] if len(parts) == 1 else torch.cat(parts)
        started.append(transport.exchange(values, ranks, buffers, tag))
        buffers = {}
    return started[0] if len(started) == 1 and not packed else _Packed(started, packed)


class _Packed:
    """An Exchange of several messages. packed: received values, the buffer to copy them to, and its ranges."""

    def __init__(self, started: Sequence[Exchange], packed: Sequence[tuple[Tensor, Tensor, Sequence[Range]]]):
        self._started, self._packed = started, packed

    def test(self) -> bool:
        """See Exchange."""
        return all([exchange.test() for exchange in self._started])

    def wait(self) -> None:
        """See Exchange."""
        for exchange in self._started:
            exchange.wait()
        for values, buffer, ranges in self._packed:
            for part, (a, b) in zip(values.split([b - a for a, b in ranges]), ranges, strict=True):
                buffer[a:b] = part
        self._started, self._packed = [], []

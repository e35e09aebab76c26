"""Gossip between clients of different sizes, whose chunks are intervals of the block (transport/intersections.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from deca_ds.gossip.averaging import Gossip
from deca_ds.transport.checksums import Exchange
from deca_ds.transport.intersections import Cut
from deca_ds.transport.uneven import UnevenTransport


class UnevenGossip(Gossip):
    """Gossip whose chunks are intervals of the block, the same for all clients; parts of this rank's may be empty.

    numels: elements of each parameter of the active block, in the order of its shard. messages: how many a chunk are
    started, as many as tensors travel.
    """

    def __init__(
        self,
        transport: UnevenTransport,
        *arguments: Any,
        numels: Callable[[], Sequence[int]],
        messages: int,
        **options: Any,
    ):
        super().__init__(transport, *arguments, **options)
        self._network, self._numels, self._messages = transport, numels, messages
        self._cuts: dict[tuple[int, ...], list[Cut]] = {}  # of each block so far
        self._active: list[Cut] = []

    def chunks(self, numel: int) -> list[slice]:
        """The parts of the active block's shard of `numel` elements, of at most chunk_mib each."""
        block = tuple(self._numels())
        if block not in self._cuts:
            self._cuts[block] = self._network.cuts(block, self._chunk_elements)
        self._active = self._cuts[block]
        assert self._active[-1].part.stop == numel, "the shard is not what ZeRO-3 makes of this block"
        return [cut.part for cut in self._active]

    def exchange(
        self, send: Tensor, destinations: Sequence[int], receives: Mapping[int, Tensor], tag: int, chunk: int
    ) -> Exchange:
        """See Gossip. chunk: number of the message, `messages` of them for each of `chunks`."""
        with self._network.cut(self._active[chunk // self._messages]):
            return super().exchange(send, destinations, receives, tag, chunk)

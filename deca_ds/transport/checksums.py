"""Messages with checksums: what arrives is what was sent, or it is not averaged.

Behind every message goes its XXH3 hash of 64 bits, as a message of its own with the same tag. TCP's checksum has 16
bits, and what damages memory on the way to it is not seen by any network. XXH3 overlooks one damage in 2^64 and reads
memory as fast as the memory allows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
import xxhash
from torch import Tensor

from deca_ds.errors import MessageError
from deca_ds.launch import ClientLayout


class Exchange(Protocol):
    """Messages under way, started by Transport.exchange."""

    def test(self) -> bool:
        """Return whether all messages are through; does not wait."""
        ...

    def wait(self) -> None:
        """Wait for all messages, one by one. MessageError names the rank, the tag and the timeout that passed."""
        ...


SIZE = 8  # bytes of a checksum
Start = Callable[[Tensor, Sequence[int], Mapping[int, Tensor], int], Exchange]


class CheckedExchange:
    """The Exchange of messages that `start` sends and receives, each with its checksum. rank: this one, of `layout`."""

    def __init__(
        self,
        start: Start,
        layout: ClientLayout,
        rank: int,
        send: Tensor,
        destinations: Sequence[int],
        receives: Mapping[int, Tensor],
        tag: int,
    ):
        self._layout, self._rank, self._receives, self._tag = layout, rank, receives, tag
        self._sums = {j: torch.empty(SIZE, dtype=torch.uint8) for j in receives}
        values = start(send, destinations, receives, tag)  # travels while the checksum is computed
        own = torch.frombuffer(bytearray(checksum(send) if destinations else SIZE), dtype=torch.uint8)
        self._started = [values, start(own, destinations, self._sums, tag)]

    def test(self) -> bool:
        """See Exchange. Raises MessageError at a wrong checksum."""
        through = all([exchange.test() for exchange in self._started])
        if through:
            self._check()
        return through

    def wait(self) -> None:
        """See Exchange. Raises MessageError at a wrong checksum."""
        for exchange in self._started:
            exchange.wait()
        self._check()

    def _check(self) -> None:
        for j, buffer in self._receives.items():
            if checksum(buffer) != self._sums[j].numpy().tobytes():
                sender = self._layout.named(j)
                raise MessageError(
                    f"a message from {sender} was damaged on its way: its checksum differs (tag {self._tag})",
                    where=self._layout.named(self._rank),
                    fix=f"look at the network between these ranks, and at the memory of the hosts of {sender} and of "
                    "this one",
                )
        self._receives = {}  # once is enough


def checksum(values: Tensor) -> bytes:
    """Return the XXH3 hash of the memory of a contiguous CPU tensor, SIZE bytes. Other threads run meanwhile."""
    return xxhash.xxh3_64_digest(values.detach().view(-1).view(torch.uint8).numpy().data)

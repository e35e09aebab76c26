"""Buffers that are reused: for what is received, and for the means."""

from __future__ import annotations

import torch
from torch import Tensor


class BufferPool:
    """Flat CPU buffers that are reused; page-locked if `pinned`, as copies to and from a GPU want them.

    Attributes: free (the buffers that are not in use, ascending by size).
    """

    def __init__(self, dtype: torch.dtype, pinned: bool):
        self._dtype, self._pinned = dtype, pinned
        self.free: list[Tensor] = []

    def take(self, numel: int) -> Tensor:
        """Return a buffer of at least `numel` elements: the smallest free one, or a new one in place of a smaller."""
        for place, buffer in enumerate(self.free):
            if buffer.numel() >= numel:
                return self.free.pop(place)
        if self.free:
            self.free.pop(0)
        return torch.empty(numel, dtype=self._dtype, pin_memory=self._pinned)

    def give_back(self, buffer: Tensor) -> None:
        """Make a taken buffer free again."""
        self.free.append(buffer)
        self.free.sort(key=Tensor.numel)


class Outputs:
    """Flat float32 buffers on `device`, one for each place, that are reused."""

    def __init__(self, device: torch.device):
        self._device = device
        self._buffers: list[Tensor] = []

    def at(self, place: int, numel: int) -> Tensor:
        """Return the buffer of `place`, (numel,); what it held may be lost."""
        while len(self._buffers) <= place:
            self._buffers.append(torch.empty(0, dtype=torch.float32, device=self._device))
        if self._buffers[place].numel() < numel:
            self._buffers[place] = torch.empty(numel, dtype=torch.float32, device=self._device)
        return self._buffers[place][:numel]

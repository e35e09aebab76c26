"""A rank's part of a tensor that all ranks of a client hold together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deca_ds.engine.masters import join


@dataclass(frozen=True)
class Slice:
    """Elements [start, stop) of the flat parameter (or persistent buffer) `name`, whose full shape is `shape`.

    values: 1-D, stop - start elements, on any device. low: for bfloat16 values, the int16 bits on the host that make
    float32 masters of them; the masters are stored then. write: writes stored values back to where the slice came from;
    None: `values` is a view of it. model_dtype: the parameter's data type in the model, where `values` are its masters
    themselves; None: that of `values`.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    values: Tensor
    low: Tensor | None = None
    write: Callable[[Tensor], None] | None = None
    model_dtype: torch.dtype | None = None

    @property
    def nbytes(self) -> int:
        """Size of what is stored."""
        return self.values.nbytes + (0 if self.low is None else self.low.nbytes)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of what is stored."""
        return self.values.dtype if self.low is None else torch.float32

    def copy(self) -> Slice:
        """Return the same slice with copies of its tensors on the host."""
        low = None if self.low is None else _on_host(self.low)
        values = _on_host(self.values)
        return Slice(self.name, self.shape, self.start, self.stop, values, low, model_dtype=self.model_dtype)

    def stored(self) -> Tensor:
        """Return the values to store: 1-D, on the host, in `dtype`."""
        values = self.values.detach().to("cpu")
        return values if self.low is None else join(values, self.low)

    def fill(self, stored: Tensor) -> None:
        """Write back what `stored` returned; it may be on any device."""
        if self.write is None:
            self.values.copy_(stored)
        else:
            self.write(stored)


def buffer_name(buffer: str, parameter: str) -> str:
    """Return the name of one of the rule's buffers for one parameter, in a checkpoint."""
    return f"{buffer}/{parameter}"


def is_buffer(name: str) -> bool:
    """Return whether `buffer_name` has made it: parameters and buffers of modules have dots."""
    return "/" in name


def _on_host(held: Tensor) -> Tensor:
    """Return a copy on the host."""
    return held.detach().to("cpu", copy=True)

"""Exact float32 masters of a bfloat16 model: its values, and 16 more bits of each.

A bfloat16 value is the upper half of a float32 pattern, so that master = value's pattern + signed low half of the
master's, as whole numbers. For that to be true of every master, ties have to be rounded away from zero: to the nearest
even value, 65,537 masters round to an even one and 65,535 to an odd one, and no 16 bits tell the former apart. The two
ways of rounding differ in one master of 131,072. NaN comes back as NaN, whichever; all else comes back as it was.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from deca_ds.errors import ModelError

_PIECE = 2**16  # elements that are worked on at a time: the scratch stays in a processor's cache


def round_into(value: Tensor, master: Tensor) -> None:
    """Overwrite `value`, 1-D, with `master`, 1-D float32; a bfloat16 value becomes the nearest, ties away from zero."""
    if value.dtype != torch.bfloat16 or master.dtype != torch.float32:
        value.copy_(master)
        return
    piece = _piece(value, master)
    for part, bits in zip(value.split(piece), master.view(torch.int32).split(piece), strict=True):
        up = bits >> 15  # its last bit is the first of those that are rounded off: set, it makes a tie more than one
        untied = up.bitwise_and_(1).bitwise_or_(bits).view(torch.float32)
        # to another device half of the bytes; torch would convert those of a GPU on the CPU
        part.copy_(untied if part.device == untied.device else untied.to(part.dtype))


def rounded(master: Tensor) -> Tensor:
    """Return the bfloat16 values of float32 masters of any shape, as `round_into` makes them."""
    value = torch.empty_like(master, dtype=torch.bfloat16, memory_format=torch.contiguous_format)
    round_into(value.view(-1), master.contiguous().view(-1))
    return value


def add_into(total: Tensor, more: Tensor) -> None:
    """Add values of any data type to a float32 `total` of their shape, both contiguous.

    Torch's own addition makes a float32 copy of all of them first, on a CPU.
    """
    if total.dtype == more.dtype or total.device.type != "cpu":
        total.add_(more)
        return
    for part, other in zip(total.view(-1).split(_PIECE), more.view(-1).split(_PIECE), strict=True):
        part.add_(other)


def low_bits(master: Tensor) -> Tensor:
    """Return the lower halves of float32 patterns, 1-D int16: a view."""
    return master.view(torch.int16)[::2]


def join_into(master: Tensor, value: Tensor, low: Tensor | None) -> None:
    """Overwrite `master`, 1-D float32, with what `value`, bfloat16, and its `low_bits` make, all on one device.

    Without low bits, with the values of any data type.
    """
    if low is None:
        master.copy_(value)
        return
    parts = (master.view(torch.int32), value.view(torch.int16), low)
    for bits, high, more in zip(*(part.split(_piece(master)) for part in parts), strict=True):
        bits.copy_(high).bitwise_left_shift_(16).add_(more)


def join(value: Tensor, low: Tensor | None) -> Tensor:
    """Return the float32 masters of 1-D `value` and `low`, new."""
    master = torch.empty_like(value, dtype=torch.float32)
    join_into(master, value, low)
    return master


def _piece(*tensors: Tensor) -> int:
    return _PIECE if all(each.device.type == "cpu" for each in tensors) else 64 * _PIECE


class LowBits(Mapping[str, Tensor]):
    """The `low_bits` of this rank's slices, by parameter: int16 on the host, zero at first.

    numels: elements of each slice. pinned: page-lock the memory, for copies from and to a GPU. Raises ModelError where
    CUDA cannot do that.
    """

    def __init__(self, numels: Mapping[str, int], pinned: bool):
        flat = torch.zeros(sum(numels.values()), dtype=torch.int16)
        self._parts: dict[str, Tensor] = dict(zip(numels, flat.split(list(numels.values())), strict=True))
        if pinned and flat.numel():
            # in place: torch's allocator of page-locked memory takes the next power of two, up to twice as much
            runtime = torch.cuda.cudart()
            status = runtime.cudaHostRegister(flat.data_ptr(), flat.nbytes, 0)
            if int(status):
                raise ModelError(
                    f"CUDA cannot page-lock {flat.nbytes / 1e9:.2f} GB of host memory, in which each rank keeps what "
                    f"rounding takes from its masters: {runtime.cudaGetErrorString(status)}",
                    where="model.masters",
                    fix="start fewer ranks on a host, give the job more of its memory, or set model.masters=rounded",
                )
            weakref.finalize(self, runtime.cudaHostUnregister, flat.data_ptr()).atexit = False

    def __getitem__(self, name: str) -> Tensor:
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

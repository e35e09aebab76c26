"""What glibc and torch keep of freed memory."""

from __future__ import annotations

import ctypes
import os
import platform
from contextlib import suppress

import torch

_LARGEST_THRESHOLD = 32 << 20  # DEFAULT_MMAP_THRESHOLD_MAX of a 64-bit glibc


def return_freed_memory() -> None:
    """Give the host back what was freed, and the GPU: glibc keeps pieces below 32 MiB in the process's heap, torch
    all of a GPU's memory, which another client on that GPU may need."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def kept_below() -> int:
    """Return the bytes below which the C library keeps a piece that was freed, for the next ones; 0 for one that is not
    glibc.

    When a process of glibc frees a piece of a size for the first time, it raises its threshold to that size, unless the
    environment sets one.
    """
    if platform.libc_ver()[0] != "glibc":
        return 0
    chosen = os.environ.get("MALLOC_MMAP_THRESHOLD_", "")
    return min(int(chosen), _LARGEST_THRESHOLD) if chosen.isdecimal() else _LARGEST_THRESHOLD

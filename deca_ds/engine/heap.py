"""What glibc keeps of freed memory."""

from __future__ import annotations

import ctypes
from contextlib import suppress


def return_freed_memory() -> None:
    """Give the host back what was freed: glibc keeps pieces below 32 MiB in the process's heap, for the next ones."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)

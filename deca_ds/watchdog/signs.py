"""Signs that this process is working, for phases inside a library that reports no progress: the resources it uses.

The signs are CPU time, memory that is touched for the first time, and bytes that are read and written, by calls and
from the disk (a mapped file is read without a call). CPU time does not count once a GPU is in use, because a thread
that only waits for another rank spins there. Child processes count as well. Without /proc, the only sign is the CPU
time of this process.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress

# per look, of which there is one a second; a waiting process uses less: the watcher and its heartbeat file, a progress
# bar, threads that poll
_CPU_S, _BYTES = 0.1, 128 * 1024
_TICK_S, _PAGE = 1 / os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGESIZE")


class Signs:
    """The resources that this process used up to the last look. Belongs to one thread, which looks about once a second
    and whose own CPU time does not count."""

    def __init__(self) -> None:
        self._cpu_s, self._bytes = _taken()

    def seen(self) -> bool:
        """Return whether this process has worked since the last look."""
        cpu_s, taken = _taken()
        works = cpu_s - self._cpu_s >= _CPU_S or taken - self._bytes >= _BYTES
        self._cpu_s, self._bytes = cpu_s, taken
        return works


def _taken() -> tuple[float, int]:
    """Return the CPU seconds and bytes that this process and its children have used; less when a child has ended."""
    import torch  # here, because a process that only reads heartbeats does without

    cpu_s = 0.0 if torch.cuda.is_initialized() else time.process_time() - time.thread_time()
    taken, own = 0, os.getpid()
    with suppress(OSError):
        taken += _moved(own) + _touched(_stat(own))
        for child in _children(own):
            stat = _stat(child)
            taken += _moved(child) + _touched(stat)
            cpu_s += (int(stat[11]) + int(stat[12])) * _TICK_S  # utime, stime
    return cpu_s, taken


def _stat(pid: int) -> list[str]:
    """Read /proc/PID/stat from the third field on: the second, the command's name, may hold anything."""
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        return file.read().rpartition(")")[2].split()


def _touched(stat: list[str]) -> int:
    return (int(stat[7]) + int(stat[9])) * _PAGE  # minor and major page faults


def _moved(pid: int) -> int:
    """Return the bytes read and written, by calls, and from and to the disk."""
    with open(f"/proc/{pid}/io", encoding="ascii") as file:
        counts = dict(line.split(": ") for line in file.read().splitlines())
    return sum(int(counts[name]) for name in ("rchar", "wchar", "read_bytes", "write_bytes"))


def _children(pid: int) -> list[int]:
    """Return the children that the main thread has started."""
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        return [int(child) for child in file.read().split()]

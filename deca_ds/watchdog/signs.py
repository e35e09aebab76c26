"""Signs that this process works, though the library that it is in calls nobody back: what it takes of its host.

They are CPU time, memory that is touched for the first time, and bytes that are read and written, by calls and from the
disk (a mapped file is read without a call). CPU time does not count once a GPU is in use: there a thread that only
waits for another rank spins. Child processes count as well. Where there is no /proc, CPU time of this process is all
that is seen.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress

# Of one look a second. What waits takes less: the watcher and its heartbeat file, a progress bar, threads that poll.
_CPU_S, _BYTES = 0.1, 128 * 1024
_TICK_S, _PAGE = 1 / os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGESIZE")


class Signs:
    """For one thread, which looks about once a second and whose own CPU time is left out."""

    def __init__(self) -> None:
        self._cpu_s, self._bytes = _taken()

    def seen(self) -> bool:
        """Whether this process has worked since the last look."""
        cpu_s, taken = _taken()
        works = cpu_s - self._cpu_s >= _CPU_S or taken - self._bytes >= _BYTES
        self._cpu_s, self._bytes = cpu_s, taken
        return works


def _taken() -> tuple[float, int]:
    """CPU seconds and bytes that this process and its children have taken; less when a child has ended."""
    import torch  # here, because who only reads heartbeats does without

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
    """/proc/PID/stat from the third field on: the second, the command's name, may hold anything."""
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        return file.read().rpartition(")")[2].split()


def _touched(stat: list[str]) -> int:
    return (int(stat[7]) + int(stat[9])) * _PAGE  # minor and major page faults


def _moved(pid: int) -> int:
    """Bytes by calls, and to and from the disk."""
    with open(f"/proc/{pid}/io", encoding="ascii") as file:
        counts = dict(line.split(": ") for line in file.read().splitlines())
    return sum(int(counts[name]) for name in ("rchar", "wchar", "read_bytes", "write_bytes"))


def _children(pid: int) -> list[int]:
    """Those that the main thread has started."""
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        return [int(child) for child in file.read().split()]

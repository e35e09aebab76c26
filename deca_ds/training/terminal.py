"""What a job tells its user goes to stdout and stderr, and what becomes of these never decides a run.

A pipe may be closed (`| head`), a disk full under a redirected log, a terminal gone or paused, a stream closed from the
start (`>&-`), and a terminal may not know a character. So stdout and stderr are replaced, for this package and for all
libraries, by streams of the same files that drop what cannot be written.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from deca_ds.printing import wrapped

_STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_PATIENCE_S = 10.0


def own_streams(patience_s: float = _PATIENCE_S) -> None:
    """Replace sys.stdout and sys.stderr, unless somebody has already, as a test does that captures them.

    patience_s: how long a write waits for a reader that does not read, before what is written is dropped until it does.
    """
    for number in range(3):  # a closed one would become the next file that is opened, and get what C libraries print
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for name, number in (("stdout", 1), ("stderr", 2)):
        before = getattr(sys, name)
        if before is not getattr(sys, f"__{name}__"):
            continue
        raw: io.FileIO | io.BufferedWriter = _Lossy(number, patience_s)
        if before is None:
            setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), "utf-8"))
            continue
        with contextlib.suppress(OSError):
            before.flush()
        if not before.write_through:
            raw = io.BufferedWriter(raw)
        options = {"line_buffering": before.line_buffering, "write_through": before.write_through}
        setattr(sys, name, io.TextIOWrapper(raw, before.encoding, "backslashreplace", **options))


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    """Restore after the body how the signals that stop or interrupt a job were handled before it."""
    before = {number: signal.getsignal(number) for number in (*_STOP, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def on_stop(handler: Callable[..., Any]) -> None:
    """Have `handler` called when the job is told to stop.

    Slurm and mpirun do that by SIGTERM; mpirun hands SIGUSR1 on to the ranks without ending them; a terminal that is
    closed sends SIGHUP, which nohup has ignored.
    """
    for number in _STOP:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def on_interrupt(handler: Callable[..., Any], told: str) -> None:
    """Have `handler` called, and `told` on stderr, at the first Ctrl-C; the second one ends this process at once."""
    lines = wrapped(told, sys.stderr)

    def first(*arguments: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if lines:
            with contextlib.suppress(OSError):  # not print: it may be what has been interrupted
                os.write(2, f"\n{lines}\n".encode())
        handler(*arguments)

    signal.signal(signal.SIGINT, first)


class _Lossy(io.FileIO):
    """A file descriptor whose writes never fail and never wait for ever. patience_s: see own_streams."""

    def __init__(self, number: int, patience_s: float):
        super().__init__(number, "w", closefd=False)
        self._patience_s = self._left_s = patience_s
        self._poll = select.poll()
        self._poll.register(number, select.POLLOUT)

    def write(self, data: Any) -> int:
        """Write what can be written of `data`; returns its length."""
        left = memoryview(data).cast("B")
        while left:
            if not self._poll.poll(1000 * self._left_s):
                self._left_s = 0.0
                break
            self._left_s = self._patience_s
            try:
                written = super().write(left[: select.PIPE_BUF])  # a pipe that is ready takes as much without waiting
            except OSError:
                break
            left = left[written or 0 :]
        return memoryview(data).nbytes

"""Start MPI with a deadline. MPI_Init waits for all ranks without end, and holds the interpreter's lock meanwhile, so
that no thread of this process could end it: a process of its own does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from deca_ds.errors import AbsentError
from deca_ds.launch.given import look_at_hosts
from deca_ds.launch.launcher import Launch

# Waits for its input to close, which it does when MPI has started or this process is gone.
_WATCHER = """
import os, select, signal, sys
if not select.select([sys.stdin], [], [], float(sys.argv[1]))[0]:
    os.write(2, sys.argv[3].encode(errors="replace"))
    os.kill(int(sys.argv[2]), signal.SIGKILL)
"""
_NEXT_S = 2.0  # that other ranks wait longer than rank 0, after which mpirun ends them all


@contextmanager
def starting(launch: Launch, meet_s: float) -> Iterator[None]:
    """End this process with a message unless the body, which imports mpi4py.MPI, is through within `meet_s` seconds."""
    within_s = meet_s + (_NEXT_S if launch.rank else 0.0)
    command = [sys.executable, "-I", "-S", "-c", _WATCHER, str(within_s), str(os.getpid())]
    environment = {key: value for key, value in os.environ.items() if key in ("PATH", "LD_LIBRARY_PATH")}
    watcher = subprocess.Popen([*command, f"\nERROR: {late(launch, meet_s)}\n"], stdin=subprocess.PIPE, env=environment)
    try:
        yield
    finally:
        assert watcher.stdin is not None
        watcher.stdin.close()
        watcher.wait()


def late(launch: Launch, meet_s: float) -> AbsentError:
    """Make the error that says that not all ranks came."""
    return AbsentError(
        f"rank {launch.rank} on {launch.host}: not all {launch.world_size} MPI ranks came within {meet_s:g} s",
        where="MPI world",
        fix=look_at_hosts(
            "look for the rank that has not started (mpirun --tag-output says which rank a line is from); where ranks "
            "are slow to start raise cluster.meet_s"
        ),
    )

"""A case of a benchmark in processes of its own, so that nothing of another one is in its memory."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

BIN = Path(sys.executable).parent
REPOSITORY = Path(__file__).resolve().parent.parent
# on CPUs with one thread; tensors in huge pages, as launchers/train.py has them
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "THP_MEM_ALLOC_ENABLE": "1"}
# Of glibc: freed memory of that size goes back to the system at once instead of staying in the process's heap.
RETURN = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def run_apart(script: str, ranks: int, arguments: Sequence[str], more: Mapping[str, str], deadline_s: float) -> None:
    """Run a script on CPU ranks of one thread each. more: environment. Raises CalledProcessError, TimeoutExpired."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [sys.executable]
    if ranks > 1:
        launcher = [str(BIN / "deepspeed"), "--num_accelerators", str(ranks), "--master_port", str(port)]
        launcher += ["--log_level", "error", "--hostfile", os.devnull]
    subprocess.run(
        [*launcher, script, *arguments],
        cwd=REPOSITORY, env=os.environ | ENVIRONMENT | more, check=True, timeout=deadline_s,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip

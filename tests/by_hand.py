"""Start ranks one by one, as by hand on their hosts: by_hand.py RANKS PORT SCRIPT ARGUMENTS... Prints their exit codes.

Fails if a rank does. With DECA_TEST_JOIN=N the ranks that are killed are started again with --join, up to N of them;
with DECA_TEST_SUPERVISED=1 `deca supervise` does that.
With DECA_TEST_DEATHS=1 ranks may end as they like. With DECA_TEST_LATE=2,3:PATH these ranks are started with --join, as
soon as there is a PATH.

Ranks are forks of this process, which imports once what takes each of them four seconds.
"""

import gc
import os
import runpy
import subprocess
import sys
import time

ranks, port, *command = sys.argv[1:]
supervised = os.environ.get("DECA_TEST_SUPERVISED") == "1"


def environment(rank: int) -> dict[str, str]:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {"RANK": str(rank), "WORLD_SIZE": ranks, "LOCAL_RANK": str(rank), "LOCAL_SIZE": ranks} | address


def import_once() -> None:
    """All but what takes hold of MPI."""
    gc.disable()
    import datasets
    import torch

    import deca_ds.engine.client
    import deca_ds.training.setup  # noqa: F401

    assert not torch.distributed.is_initialized() and "mpi4py.MPI" not in sys.modules
    del datasets
    gc.freeze()


def start(rank: int, *more: str) -> int:
    """The process id."""
    if supervised:
        start = ["deca", "supervise", "--pause=0.2", sys.executable, *command, *more]
        return subprocess.Popen(start, env=os.environ | environment(rank)).pid
    sys.stdout.flush()
    if process := os.fork():
        return process
    os.environ |= environment(rank)
    sys.argv = [*command, *more]
    sys.orig_argv = [sys.executable, *sys.argv]
    sys.path[0] = os.path.dirname(os.path.abspath(command[0]))
    runpy.run_path(command[0], run_name="__main__")
    sys.exit()


def main(joins: int) -> int:
    if not supervised:
        import_once()
    late, _, sign = os.environ.get("DECA_TEST_LATE", "").partition(":")
    absent = [int(rank) for rank in late.split(",") if rank]
    running = {start(rank): rank for rank in range(int(ranks)) if rank not in absent}
    codes = {}
    while running:
        if absent and os.path.exists(sign):
            running |= {start(rank, "--join"): rank for rank in absent}
            absent = []
        process, status = os.waitpid(-1, os.WNOHANG)
        if not process:
            time.sleep(0.1)
            continue
        rank = running.pop(process)
        codes[rank] = os.waitstatus_to_exitcode(status)
        if codes[rank] < 0 < joins:
            joins -= 1
            running[start(rank, "--join")] = rank
    print("exit codes:", [codes[rank] for rank in sorted(codes)])
    return 0 if os.environ.get("DECA_TEST_DEATHS") == "1" else max(map(abs, codes.values()))


if __name__ == "__main__":
    sys.exit(main(int(os.environ.get("DECA_TEST_JOIN", 0))))

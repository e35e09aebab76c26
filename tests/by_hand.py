"""Start ranks one by one, as by hand on their hosts: by_hand.py RANKS PORT SCRIPT ARGUMENTS... Prints their exit codes.

Fails if a rank does. With DECA_TEST_JOIN=N the ranks that are killed are started again with --join, up to N of them;
with DECA_TEST_SUPERVISED=1 `deca supervise` does that.
With DECA_TEST_DEATHS=1 ranks may end as they like. With DECA_TEST_LATE=2,3:PATH these ranks are started with --join, as
soon as the file PATH has a line.
"""

import os
import subprocess
import sys
import time

from preloaded import PYTHON

ranks, port, *command = sys.argv[1:]
joins = int(os.environ.get("DECA_TEST_JOIN", 0))
supervised = ["deca", "supervise", "--pause=0.2"] if os.environ.get("DECA_TEST_SUPERVISED") == "1" else []


def start(rank: int, *more: str) -> subprocess.Popen:
    environment = {"RANK": str(rank), "WORLD_SIZE": ranks, "LOCAL_RANK": str(rank), "LOCAL_SIZE": ranks}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return subprocess.Popen([*supervised, *PYTHON, *command, *more], env=os.environ | environment)


late, _, sign = os.environ.get("DECA_TEST_LATE", "").partition(":")
absent = [int(rank) for rank in late.split(",") if rank]
started = {rank: start(rank) for rank in range(int(ranks)) if rank not in absent}
while any(process.poll() is None for process in started.values()):
    if absent and os.path.exists(sign) and os.path.getsize(sign):
        started |= {rank: start(rank, "--join") for rank in absent}
        absent = []
    for rank, process in started.items():
        if joins and (process.poll() or 0) < 0:
            joins -= 1
            started[rank] = start(rank, "--join")
    time.sleep(0.1)
codes = [process.wait() for process in started.values()]
print("exit codes:", codes)
sys.exit(0 if os.environ.get("DECA_TEST_DEATHS") == "1" else max(map(abs, codes)))

"""Two clients: one is slow and at work, three times; the third time it stops working. Started by mpirun, no model.

Usage: patience_worker.py FOLDER
"""

import sys
import time
from pathlib import Path

from mpi4py import MPI
from torch.distributed import PrefixStore

from deca_ds.launch import read_launch
from deca_ds.launch.launcher import ClientLayout
from deca_ds.launch.store import open_job_store
from deca_ds.transport.collectives import barrier
from deca_ds.transport.gloo import GlooTransport
from deca_ds.transport.mpi import MpiTransport
from deca_ds.transport.transport import Endpoint
from deca_ds.watchdog.guard import guarded

TIMEOUT_S, WORK_S, LAYOUT = 8.0, 10.0, ClientLayout(2, 1)

launch = read_launch()
store = open_job_store(launch, 60)
with guarded(launch, store) as guard:
    guard.write_to(Path(sys.argv[1]))
    progress = guard.progress
    progress.watch(LAYOUT, 60.0)
    deadline_s = progress.deadline_s(60.0)
    end = Endpoint(LAYOUT, launch.rank, deadline_s)
    transports = [
        MpiTransport(MPI.COMM_WORLD, end),
        GlooTransport(PrefixStore("transport", store.store), end),
    ]
    for transport in transports:
        transport.progress = progress
        barrier(transport)
    progress.watch(LAYOUT, TIMEOUT_S)
    for transport in transports:
        if launch.rank == 1:
            for step in range(int(WORK_S / 0.25)):
                progress.enter("gradient", step=step + 1)
                time.sleep(0.25)
        progress.enter("the end")
        barrier(transport)
        print(f"rank {launch.rank} passed {type(transport).__name__}", flush=True)
    if launch.rank == 1:
        progress.enter("gradient", step=99)
        time.sleep(600)
    barrier(transports[0])

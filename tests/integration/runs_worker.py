"""Several runs in one job, one after the other on the same ranks: what a test saves in start-up.

Usage: runs_worker.py RUNS.json, a list of lists of key=value; clients and ranks are the same in all of them.
"""

import gc
import json
import sys
from pathlib import Path

gc.disable()  # while importing, as launchers/train.py does

import torch

from deca_ds.config import load_config
from deca_ds.gossip.schedule import build_mixing
from deca_ds.launch import read_launch
from deca_ds.launch.store import open_job_store
from deca_ds.launch.world import connect
from deca_ds.training.build import build
from deca_ds.training.connect import Job, connect_clients
from deca_ds.training.ways_to_start import NewRun
from deca_ds.transport.collectives import barrier
from deca_ds.watchdog.guard import guarded

gc.freeze()
gc.enable()
configs = [load_config(None, overrides) for overrides in json.loads(Path(sys.argv[-1]).read_text())]
print("computes with", torch.backends.cpu.get_cpu_capability(), flush=True)
launch = read_launch()
store = open_job_store(launch, 60)
with guarded(launch, store) as guard:
    cluster = connect(configs[0], launch, store)
    connected = connect_clients(configs[0], cluster, guard)
    for config in configs:
        mixing = build_mixing(config.gossip, config.cluster.clients, config.run.seed)
        trainer = build(Job(config, cluster, connected, guard, mixing), NewRun())
        trainer.train()
        trainer.metrics.close()
    barrier(connected.transport)

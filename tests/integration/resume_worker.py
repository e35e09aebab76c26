"""Several runs in one job, of which some are left in the middle, as by a crash, and some continue.

Usage: resume_worker.py RUNS.json, a list of {"keys": [key=value, ...], "leave_after": inner steps, "evaluation" (the
last one fails), "saving" (the final one does), "done" (it is left as a run that has finished) or null, and optionally
"keep_masters": whether the masters of all blocks stay alive, as float32}; clients and ranks are the same in all of
them. What a run that continues in the middle of an activation holds is compared with its checkpoint before it trains.
"""

import gc
import json
import sys
from pathlib import Path

gc.disable()  # while importing, as launchers/train.py does

import torch

from deca_ds.checkpoint.done import mark_done
from deca_ds.checkpoint.shards import ShardedModel
from deca_ds.config import load_config
from deca_ds.engine.masters import join, rounded
from deca_ds.engine.slices import buffer_name
from deca_ds.gossip.schedule import build_mixing
from deca_ds.launch import read_launch
from deca_ds.launch.store import open_job_store
from deca_ds.launch.world import connect
from deca_ds.training.build import build
from deca_ds.training.connect import Job, connect_clients
from deca_ds.training.start import begin_or_resume
from deca_ds.training.ways_to_start import ResumedRun
from deca_ds.transport.collectives import barrier
from deca_ds.watchdog.guard import guarded

gc.freeze()
gc.enable()


class Left(Exception):
    pass


class LeaveAfter:
    def __init__(self, step: int):
        self.step = step

    def may_pass(self, done: int) -> bool:
        if done == self.step:
            raise Left
        return True


def leave(trainer, where: int | str) -> None:
    """Have `train` raise Left there."""
    if isinstance(where, int):
        trainer.stop = LeaveAfter(where)
        return

    def fail(*arguments) -> float | None:
        if trainer.done == len(trainer.schedule):
            raise Left
        return evaluate(*arguments)

    evaluate, name = trainer._evaluate, {"evaluation": "_evaluate", "saving": "_save"}[where]
    setattr(trainer, name, fail)


def compare(trainer, resumption) -> None:
    """Bit by bit, whatever number of ranks wrote the checkpoint: the model, and all of the active block's state."""
    saved, client = ShardedModel(resumption.saved.folder), trainer.client
    active = {name for name, *_ in client.block_shards()}
    assert active, "the checkpoint is from between two blocks"
    for block in client.plan.blocks:
        for name, start, stop, values, low in client.masters(block.names):
            stored = saved.read(name, trainer.cluster.client).flatten()[start:stop]
            assert stored.dtype == torch.float32 and torch.equal(join(values, low), stored)
        for name, start, stop, values in client.shards(block.names):
            stored = saved.read(name, trainer.cluster.client).flatten()[start:stop]
            assert torch.equal(values, rounded(stored) if values.dtype == torch.bfloat16 else stored)
    for name, start, stop, state in client.block_shards():
        assert set(state) == {"theta", "grad", *trainer.rule.buffers}
        for key in set(state) - {"grad"}:
            stored = saved.read(name if key == "theta" else buffer_name(key, name), trainer.cluster.client)
            assert stored.dtype == torch.float32 and torch.equal(state[key], stored.flatten()[start:stop])
    assert all(tensor.any() for key, tensor in client.active.tensors.items() if key != "grad")


def keep_masters(client) -> dict[str, torch.Tensor]:
    """Have a block continue from the float32 masters that it ended with, which are returned by parameter."""
    kept: dict[str, torch.Tensor] = {}
    open_block, close_block = client.open_block, client.close_block

    def opened(index, buffers):
        state = open_block(index, buffers)
        for name, _, _, tensors in client.block_shards():
            tensors["theta"].copy_(kept.get(name, tensors["theta"]))
        return state

    def closing():
        kept.update({name: tensors["theta"].clone() for name, _, _, tensors in client.block_shards()})
        close_block()

    client.open_block, client.close_block = opened, closing
    return kept


runs = [
    (load_config(None, run["keys"]), run["leave_after"], run.get("keep_masters"))
    for run in json.loads(Path(sys.argv[-1]).read_text())
]
launch = read_launch()
store = open_job_store(launch, 60)
with guarded(launch, store) as guard:
    cluster = connect(runs[0][0], launch, store)
    connected = connect_clients(runs[0][0], cluster, guard)
    for config, leave_after, keep in runs:
        mixing = build_mixing(config.gossip, config.cluster.clients, config.run.seed)
        start = begin_or_resume(config, launch, store, guard, mixing)
        if start is None:
            print("nothing left to do", flush=True)
            continue
        trainer = build(Job(config, cluster, connected, guard, mixing), start)
        if isinstance(start, ResumedRun) and start.resumption.place.get("inner"):
            compare(trainer, start.resumption)
        if leave_after not in (None, "done"):
            leave(trainer, leave_after)
        kept = keep_masters(trainer.client) if keep else {}
        try:
            trainer.train()
            if trainer.stopped_early:
                print(trainer.stopped_early, flush=True)
        except Left:
            trainer.checkpoints.wait()
        if leave_after == "done":
            trainer.meet()
            if cluster.is_job_leader:
                mark_done(trainer.output, len(trainer.schedule))
            trainer.meet()
            trainer.checkpoints.forget()
        for name, _, _, values, low in trainer.client.masters(tuple(kept)):
            assert torch.equal(join(values, low), kept[name]) and (values.numel() == 0 or low.any())
        trainer.metrics.close()
    barrier(connected.transport)

"""What it costs to be ready to leave out late neighbours (gossip.wait_s), while none is late.

    mpirun -n 4 python benchmarks/late_neighbours.py

A ring over MPI on this machine, on which averagings that wait for all alternate with averagings with gossip.wait_s.
Prints milliseconds of an averaging on rank 0, medians, for a shard of one number and for one of 16 MiB; and the
microseconds of one operation of the job's store.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import deque
from datetime import timedelta

import torch
from mpi4py import MPI
from torch.distributed import PrefixStore, Store, TCPStore

from deca_ds.config.schema import GossipConfig
from deca_ds.gossip.gossip import Gossip
from deca_ds.gossip.late_exchange import LateExchange
from deca_ds.gossip.schedule import build_mixing
from deca_ds.gossip.strategies import begin
from deca_ds.launch.launcher import ClientLayout
from deca_ds.transport.mpi import MpiTransport
from deca_ds.transport.transport import Endpoint

WARM_UP, REPETITIONS, WAIT_S = 5, 60, 60.0


def open_store(world: MPI.Intracomm) -> Store:
    timeout = timedelta(seconds=60)
    server = (
        TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timeout) if not world.rank else None
    )
    port = world.bcast(server.port if server is not None else None)
    return server or TCPStore("127.0.0.1", port, is_master=False, timeout=timeout)


def average(gossip: Gossip, t: int, x: torch.Tensor) -> float:
    """Seconds."""
    started = time.perf_counter()
    averaging = begin(gossip, t)
    for chunk in gossip.chunks([x.numel()]):
        averaging.send(chunk, "x", x[chunk.part])
    deque(averaging.settle(), maxlen=0)
    assert averaging.mixes
    return time.perf_counter() - started


def main() -> None:
    torch.set_num_threads(1)
    world = MPI.COMM_WORLD
    transport = MpiTransport(world, Endpoint(ClientLayout(world.size, 1), world.rank, timeout_s=60))
    store = open_store(world)
    schedule = build_mixing(GossipConfig(graph="ring"), world.size, seed=0)
    ready = Gossip(transport, schedule, 4.0, late=LateExchange(transport, PrefixStore("late", store), WAIT_S))
    kinds = {"waits for all": Gossip(transport, schedule, 4.0), "gossip.wait_s": ready}
    found: dict[str, dict[str, float]] = {}
    t = 0
    for name, numel in (("one number", 1), ("16 MiB", 2**22)):
        x, taken = torch.randn(numel), {kind: list[float]() for kind in kinds}
        for _ in range(WARM_UP + REPETITIONS):
            for kind, gossip in kinds.items():
                world.Barrier()
                taken[kind].append(average(gossip, t, x))
                t += 1
        found[name] = {kind: round(1e3 * statistics.median(each[WARM_UP:]), 3) for kind, each in taken.items()}
    ready.drain()
    assert not ready.skip_log.times
    if world.rank == 0:
        operations = 1000
        started = time.perf_counter()
        for number in range(operations):
            store.compare_set(f"benchmark/{number}", "", "taken 0")
        found["store"] = {"microseconds of an operation": round(1e6 * (time.perf_counter() - started) / operations, 1)}
        print(json.dumps(found))
    world.Barrier()


if __name__ == "__main__":
    main()

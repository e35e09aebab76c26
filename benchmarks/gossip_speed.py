"""An averaging beside the bare messages of the same bytes, in one run: how much of the network's speed is left.

    python benchmarks/gossip_speed.py [--results FILE] [--transports mpi mpi-tcp torch] [--links 10gbit] [--ranks 2 4]
        [--mib 1 4 16 64 256] [--chunk-mib 8]

Starts the ranks by itself, each a client of a ring on this machine with a shard of so many MiB. They are joined by MPI
in shared memory, by MPI over TCP on the loopback interface (Open MPI with OMPI_MCA_btl=tcp,self), by gloo, or by MPI
over links of these rates between hosts, which are network namespaces here: that takes root and `tc`. These alternate, a
repetition of each after the other:

    raw         the shard to every neighbour and every neighbour's shard into a buffer of its own, one message each:
                Isend, Irecv and Waitall of MPI, or send, recv and wait of gloo
    arithmetic  what an averaging computes, without messages: checksums of what is sent and received, and the mean
    plain       an averaging as the trainer does it, but without checksums (gossip.checksums=false)
    checked     an averaging as the trainer does it; with --chunk-mib also with chunks of these sizes (checked_8)

A repetition takes as long as its slowest rank. Prints a line of JSON for each transport, number of ranks and size: the
machine's load, milliseconds (median and least) and the part of raw's speed that is left, raw / averaging, as the median
over repetitions and as the quotient of the least times. bound_of_raw is raw / (raw + arithmetic): what is left where no
core is free to compute while messages travel and the cache keeps nothing from the one to the other.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hosts import Hosts, may_make_hosts
from torch import Tensor
from torch.distributed import TCPStore

from deca_ds.config.schema import GossipConfig
from deca_ds.gossip.gossip import Gossip
from deca_ds.gossip.mean import weighted_mean
from deca_ds.gossip.schedule import build_mixing
from deca_ds.gossip.strategies import begin
from deca_ds.launch.launcher import ClientLayout
from deca_ds.transport.checksums import checksum
from deca_ds.transport.collectives import barrier, gather_json
from deca_ds.transport.gloo import GlooTransport
from deca_ds.transport.transport import Endpoint, Transport

WARM_UP, BUDGET_MIB, MOST, TIMEOUT_S = 3, 1024, 60, 60.0
RAW_TAG = 32_000
MPI_KINDS = {"mpi": {}, "mpi-tcp": {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "tcp,self"}}  # with Open MPI's settings
KINDS = [*MPI_KINDS, "torch"]


def mpi_ends() -> tuple[Transport, Callable[[Tensor, dict[int, Tensor]], None]]:
    """The transport, and its bare messages."""
    from mpi4py import MPI

    from deca_ds.transport.mpi import MpiTransport

    comm = MPI.COMM_WORLD.Dup()

    def raw(x: Tensor, buffers: dict[int, Tensor]) -> None:
        requests = [comm.Irecv(buffer.numpy(), j, RAW_TAG) for j, buffer in buffers.items()]
        requests += [comm.Isend(x.numpy(), j, RAW_TAG) for j in buffers]
        MPI.Request.Waitall(requests)

    return MpiTransport(MPI.COMM_WORLD, Endpoint(ClientLayout(comm.size, 1), comm.rank, TIMEOUT_S)), raw


def torch_ends(rank: int, ranks: int, port: int) -> tuple[Transport, Callable[[Tensor, dict[int, Tensor]], None]]:
    """See mpi_ends."""
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=TIMEOUT_S))
    transport = GlooTransport(store, Endpoint(ClientLayout(ranks, 1), rank, TIMEOUT_S))
    group: Any = transport._group  # torch declares neither send nor recv of gloo's group

    def raw(x: Tensor, buffers: dict[int, Tensor]) -> None:
        works = [group.recv([buffer], j, RAW_TAG) for j, buffer in buffers.items()]
        works += [group.send([x], j, RAW_TAG) for j in buffers]
        for work in works:
            work.wait()

    return transport, raw


def average(gossip: Gossip, t: int, x: Tensor) -> None:
    """Average as training/step.py does it, without the arithmetic of a method."""
    averaging = begin(gossip, t)
    for chunk in gossip.chunks([x.numel()]):
        averaging.send(chunk, "x", x[chunk.part])
    deque(averaging.settle(), maxlen=0)


def measure(
    transport: Transport, raw: Callable[[Tensor, dict[int, Tensor]], None], mib: int, chunks: Sequence[float]
) -> dict[str, object]:
    """What a rank finds for shards of `mib` MiB; the same on all ranks. chunks: more values of gossip.chunk_mib."""
    schedule = build_mixing(GossipConfig(graph="ring"), transport.clients, seed=0)
    x = torch.randn(mib * 2**18, generator=torch.Generator().manual_seed(transport.client))
    buffers = {j: torch.ones_like(x) for j in schedule.sources(transport.client, 0)}
    gossip = Gossip(transport, schedule, GossipConfig().chunk_mib)

    def averaging(gossip: Gossip, checksums: bool) -> None:
        transport.checksums = checksums
        average(gossip, 0, x)

    def arithmetic() -> None:
        client, weights = transport.client, {j: schedule.weight(transport.client, j, 0) for j in range(schedule.size)}
        for part in (chunk.part for chunk in gossip.chunks([x.numel()])):
            terms = {client: x[part]} | {j: buffer[part] for j, buffer in buffers.items()}
            for term in terms.values():
                checksum(term)
            weighted_mean(terms, weights, gossip.outputs.at(0, terms[client].numel()))

    kinds: dict[str, Callable[[], None]] = {
        "raw": lambda: raw(x, buffers),
        "arithmetic": arithmetic,
        "plain": lambda: averaging(gossip, False),
        "checked": lambda: averaging(gossip, True),
    }
    for mib_of_chunk in chunks:
        kinds[f"checked_{mib_of_chunk:g}"] = partial(averaging, Gossip(transport, schedule, mib_of_chunk), True)
    taken: dict[str, list[float]] = {kind: [] for kind in kinds}
    repetitions = max(7, min(MOST, BUDGET_MIB // mib))
    for repetition in range(WARM_UP + repetitions):
        for kind in [*kinds][repetition % len(kinds) :] + [*kinds][: repetition % len(kinds)]:
            barrier(transport)
            started = time.perf_counter()
            kinds[kind]()
            taken[kind].append(time.perf_counter() - started)
    everybody = gather_json(transport, {kind: each[WARM_UP:] for kind, each in taken.items()})
    slowest = {kind: [max(times) for times in zip(*(each[kind] for each in everybody), strict=True)] for kind in kinds}
    found: dict[str, object] = {"mib": mib, "neighbours": len(buffers), "repetitions": repetitions}
    found["load"] = round(os.getloadavg()[0], 1)
    for kind, times in slowest.items():
        found[f"{kind}_ms"] = [round(1e3 * statistics.median(times), 3), round(1e3 * min(times), 3)]
    for kind in [*kinds][2:]:
        quotients = [r / t for r, t in zip(slowest["raw"], slowest[kind], strict=True)]
        least = min(slowest["raw"]) / min(slowest[kind])
        found[f"{kind}_of_raw"] = [round(statistics.median(quotients), 3), round(least, 3)]
    bounds = [r / (r + a) for r, a in zip(slowest["raw"], slowest["arithmetic"], strict=True)]
    least = min(slowest["raw"]) / (min(slowest["raw"]) + min(slowest["arithmetic"]))
    found["bound_of_raw"] = [round(statistics.median(bounds), 3), round(least, 3)]
    return found


def work(kind: str, sizes: Sequence[int], chunks: Sequence[float], place: Sequence[int]) -> None:
    torch.set_num_threads(1)
    transport, raw = mpi_ends() if kind in MPI_KINDS else torch_ends(*place)
    for mib in sizes:
        found = measure(transport, raw, mib, chunks)
        if transport.client == 0:
            print(json.dumps(found), flush=True)
    barrier(transport)
    transport.close()


def run(kind: str, ranks: int, sizes: Sequence[int], chunks: Sequence[float]) -> list[dict[str, object]]:
    """Start the ranks and wait for them; what rank 0 printed. kind: of KINDS, or the rate of a link."""
    worker = kind if kind in KINDS else "mpi"
    script = [sys.executable, __file__, "--worker", worker, "--mib", *map(str, sizes), "--chunk-mib", *map(str, chunks)]
    environment = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1"}
    environment |= os.environ | MPI_KINDS.get(kind, {})
    if kind not in KINDS:
        hosts = Hosts(ranks)
        with tempfile.TemporaryDirectory() as folder:
            hosts.set_up()
            try:
                hosts.limit(kind)
                return wait(kind, ranks, [hosts.mpirun(Path(folder), *script)], environment)
            finally:
                hosts.clean_up()
    if kind in MPI_KINDS:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        commands = [[shutil.which("mpirun", path=path) or "mpirun", "--oversubscribe", "-n", str(ranks), *script]]
    else:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        commands = [[*script, "--place", str(rank), str(ranks), str(store.port)] for rank in range(ranks)]
    return wait(kind, ranks, commands, environment)


def wait(
    kind: str, ranks: int, commands: Sequence[Sequence[str]], environment: Mapping[str, str]
) -> list[dict[str, object]]:
    """Start these commands and wait for them; what the first one printed."""
    started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for command in commands]
    try:
        outputs = [process.communicate(timeout=1200)[0] for process in started]
    finally:
        for process in started:
            process.terminate()
    if any(process.returncode for process in started):
        sys.exit(f"{kind} with {ranks} ranks failed")
    return [{"transport": kind, "ranks": ranks} | json.loads(line) for line in outputs[0].splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transports", nargs="*", default=KINDS, choices=KINDS)
    parser.add_argument("--links", nargs="*", default=[], metavar="RATE", help="as tc writes it: 10gbit")
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--mib", nargs="+", type=int, default=[1, 4, 16, 64, 256])
    parser.add_argument("--chunk-mib", nargs="*", type=float, default=[])
    parser.add_argument("--results", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--place", nargs=3, type=int, default=(), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options.worker, options.mib, options.chunk_mib, options.place)
    if options.links and not may_make_hosts():
        sys.exit("--links takes root and network namespaces (iproute2)")
    rows = []
    for kind in (*options.transports, *options.links):
        for ranks in options.ranks:
            for row in run(kind, ranks, options.mib, options.chunk_mib):
                rows.append(row)
                print(json.dumps(row), flush=True)
    if options.results:
        about = {"command": " ".join(["python", *sys.argv]), "cores": len(os.sched_getaffinity(0)), "rows": rows}
        options.results.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()

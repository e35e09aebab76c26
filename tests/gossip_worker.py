"""What every client runs in the transport tests: in threads, in gloo processes and under mpirun.

As a script: gossip_worker.py mpi RESULT_DIR, or gossip_worker.py torch RESULT_DIR CLIENT CLIENTS STORE_PORT.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path

import torch

from deca_ds.config.schema import GossipConfig
from deca_ds.errors import GossipError
from deca_ds.gossip.averaging import Mean
from deca_ds.gossip.codec import CODECS
from deca_ds.gossip.gossip import Gossip
from deca_ds.gossip.schedule import build_mixing
from deca_ds.gossip.strategies import begin
from deca_ds.launch.launcher import ClientLayout
from deca_ds.transport import collectives
from deca_ds.transport.collectives import all_reduce_sum, barrier, gather_json
from deca_ds.transport.transport import Endpoint, Transport

GRAPHS = ["ring", "one_peer_exponential", "base", "erdos_renyi"]
NUMEL, CHUNK_MIB, STEPS = 10_007, 0.01, 9
SILENT_TAG = 99


def start_values(client: int, numel: int = NUMEL) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(client))


def digest(x: torch.Tensor) -> str:
    return hashlib.sha256(x.numpy().tobytes()).hexdigest()


def mix(gossip: Gossip, t: int, x: torch.Tensor) -> torch.Tensor:
    """What averaging t makes of the shard of a block that is one parameter, as the trainer does it."""
    averaging, mixed = begin(gossip, t), x.clone()

    def take(means: Iterable[Mean]) -> None:
        for chunk, _, values in means:
            mixed[chunk.part] = values

    for chunk in gossip.chunks([x.numel()]) if averaging.mixes else ():
        take(averaging.send(chunk, "x", x[chunk.part]))
    take(averaging.settle())
    return mixed


def average(transport: Transport, graph: str, steps: int = STEPS, wire: str = "float32") -> torch.Tensor:
    """The shard after `steps` averagings, in chunks."""
    schedule = build_mixing(GossipConfig(graph=graph), transport.clients, seed=4)
    gossip = Gossip(transport, schedule, CHUNK_MIB, codec=CODECS[wire])
    x = start_values(transport.client)
    for t in range(steps):
        x = mix(gossip, t, x)
    return x


def checks(transport: Transport, hold: Callable[[], None]) -> dict:
    """Everything that has to be equal over all transports, and how a silent neighbour is reported.

    hold: waits, apart from the transport, until all clients are here.
    """
    client, n = transport.client, transport.clients
    result: dict = {graph: digest(average(transport, graph)) for graph in GRAPHS}
    result["bytes"] = transport.bytes_sent
    transport.checksums = True
    assert {graph: digest(average(transport, graph)) for graph in GRAPHS} == {graph: result[graph] for graph in GRAPHS}
    result |= {wire: digest(average(transport, "ring", wire=wire)) for wire in CODECS}
    collectives.REDUCE_PIECE = 1000
    for dtype in (torch.float32, torch.float64):
        total = start_values(client).to(dtype) / 3
        all_reduce_sum(transport, total)
        result[f"sum {dtype}"] = digest(total)
    one = torch.tensor([float(client)])
    all_reduce_sum(transport, one)
    result["sum of one"] = one.item()
    result["json"] = gather_json(transport, {"client": client, "name": "ü" * client, "loss": 1 / (1 + client)})
    barrier(transport)

    right, left = (client + 1) % n, (client - 1) % n
    half = torch.empty(5, dtype=torch.bfloat16)
    exchange = transport.exchange(torch.full((5,), client + 0.5, dtype=torch.bfloat16), [right], {left: half}, 1)
    while not exchange.test():
        pass
    exchange.wait()
    result["bfloat16"] = half.tolist()

    # Client 0 waits for client 1, which never sends.
    hold()
    if client == 0:
        transport.timeout_s = 0.5
        try:
            transport.exchange(torch.zeros(1), [], {1: torch.empty(1)}, SILENT_TAG).wait()
        except GossipError as error:
            result["silent"] = str(error)
    hold()
    return result


def run_mpi(folder: Path) -> None:
    from mpi4py import MPI

    from deca_ds.transport import mpi

    mpi.MESSAGE_BYTES = 4096  # so that chunks travel in several messages
    world = MPI.COMM_WORLD
    layout = ClientLayout(world.size, 1)
    transport = mpi.MpiTransport(world, Endpoint(layout, world.rank, timeout_s=60))
    # A message shorter than its buffer must not pass for a whole one.
    other = mpi.MpiTransport(world, Endpoint(layout, world.rank, timeout_s=60))
    short = ""
    try:
        buffers = {(other.client - 1) % other.clients: torch.empty(3)}
        other.exchange(torch.zeros(2), [(other.client + 1) % other.clients], buffers, 5).wait()
    except GossipError as error:
        short = str(error)
    result = {**checks(transport, world.Barrier), "short": short}
    (folder / f"{transport.client}.json").write_text(json.dumps(result))
    transport.close()
    transport.close()


def run_torch(folder: Path, client: int, clients: int, port: int) -> None:
    from torch.distributed import TCPStore

    from deca_ds.transport.gloo import GlooTransport

    store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    holds = 0

    def hold() -> None:
        nonlocal holds
        holds += 1
        store.set(f"hold/{holds}/{client}", "here")
        store.wait([f"hold/{holds}/{j}" for j in range(clients)])

    transport = GlooTransport(store, Endpoint(ClientLayout(clients, 1), client, timeout_s=60))
    result = checks(transport, hold)
    (folder / f"{client}.json").write_text(json.dumps(result))
    transport.close()
    transport.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "mpi":
        run_mpi(Path(sys.argv[2]))
    else:
        run_torch(Path(sys.argv[2]), *map(int, sys.argv[3:6]))

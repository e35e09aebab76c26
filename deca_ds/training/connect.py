"""The transport between clients, by how the job was launched and what it is to outlive."""

from __future__ import annotations

from functools import partial

from torch.distributed import PrefixStore

from deca_ds.config import Config
from deca_ds.elastic.client import QuorumClient, open_votes
from deca_ds.elastic.reconnect_gloo import ReconnectingGloo
from deca_ds.elastic.reconnect_ulfm import ReconnectingUlfm
from deca_ds.elastic.rejoin import Visit
from deca_ds.launch import Cluster
from deca_ds.launch.progress import EVERYBODY
from deca_ds.transport.gloo import GlooTransport
from deca_ds.transport.mpi import MpiTransport
from deca_ds.transport.transport import Transport
from deca_ds.transport.uneven import UnevenTransport, all_ranks_join, torch_between_ranks
from deca_ds.watchdog.guard import JobGuard


def connect_transport(config: Config, cluster: Cluster, guard: JobGuard, visit: Visit | None = None) -> Transport:
    """The way between same-index ranks of all clients, or between all ranks where clients differ in size: MPI where the
    launcher made an MPI world, else torch.

    visit: of a client that comes back; its transport is not connected until it is let in.
    """
    cluster.progress.enter("connecting the clients")
    cluster.progress.wait_for(EVERYBODY)
    timeout_s, survives = cluster.progress.deadline_s(config.cluster.timeout_s), config.cluster.on_failure == "continue"
    transport: MpiTransport | GlooTransport | UnevenTransport
    if survives and cluster.gossip_comm is None:
        transport = _voting(config, cluster, guard, visit, timeout_s)
    elif survives:
        from mpi4py import MPI

        announcement = partial(guard.site.announcement, layout=cluster.layout)
        transport = ReconnectingUlfm(MPI.COMM_WORLD, cluster.layout, cluster.membership, announcement, timeout_s)
    elif cluster.gossip_comm is not None:
        transport = MpiTransport(cluster.gossip_comm, timeout_s)
    else:
        store = PrefixStore("transport", cluster.store.store)
        if cluster.layout.even:
            transport = GlooTransport(store, cluster.shard, cluster.client, cluster.clients, timeout_s)
        else:
            transport = torch_between_ranks(store, cluster.launch, timeout_s)
    transport.checksums = config.gossip.checksums
    if not cluster.layout.even:
        transport = UnevenTransport(transport, cluster.layout)
    cluster.progress.wait_for(None)
    transport.progress = cluster.progress
    return transport


def _voting(
    config: Config, cluster: Cluster, guard: JobGuard, visit: Visit | None, timeout_s: float
) -> ReconnectingGloo:
    silence_s = config.cluster.timeout_s
    if visit is None:
        votes = open_votes(cluster.launch, cluster.layout, cluster.store, timeout_s, silence_s)
    else:
        votes = QuorumClient(
            cluster.launch.rank, cluster.layout, visit.addresses, timeout_s, silence_s, visit.own, visit
        )
    who = cluster.membership, partial(guard.site.announcement, layout=cluster.layout)
    connected = visit is None
    if cluster.layout.even:
        return ReconnectingGloo(votes, guard.site, cluster.shard, cluster.client, *who, timeout_s, connected=connected)
    rank, ranks_of = cluster.launch.rank, cluster.layout.ranks_of
    with all_ranks_join(cluster.launch, timeout_s):
        return ReconnectingGloo(votes, guard.site, 0, rank, *who, timeout_s, connected=connected, peers_of=ranks_of)

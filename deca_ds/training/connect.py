"""The transport between clients, by how the job was launched and what it is to outlive."""

from __future__ import annotations

from torch.distributed import PrefixStore

from deca_ds.cluster import Cluster
from deca_ds.cluster.guard import JobGuard
from deca_ds.cluster.progress import EVERYBODY
from deca_ds.cluster.visit import Visit
from deca_ds.cluster.votes import Votes, open_votes
from deca_ds.config import Config
from deca_ds.gossip.mpi import MpiTransport
from deca_ds.gossip.torch_p2p import TorchTransport
from deca_ds.gossip.transport import Transport
from deca_ds.gossip.ulfm import UlfmTransport
from deca_ds.gossip.uneven import UnevenTransport, all_ranks_join, torch_between_ranks
from deca_ds.gossip.voting import VotingTransport


def connect_transport(config: Config, cluster: Cluster, guard: JobGuard, visit: Visit | None = None) -> Transport:
    """The way between same-index ranks of all clients, or between all ranks where clients differ in size: MPI where the
    launcher made an MPI world, else torch.

    visit: of a client that comes back; its transport is not connected until it is let in.
    """
    cluster.progress.enter("connecting the clients")
    cluster.progress.wait_for(EVERYBODY)
    timeout_s, survives = cluster.progress.deadline_s(config.cluster.timeout_s), config.cluster.on_failure == "continue"
    transport: MpiTransport | TorchTransport | UnevenTransport
    if survives and cluster.gossip_comm is None:
        transport = _voting(config, cluster, guard, visit, timeout_s)
    elif survives:
        from mpi4py import MPI

        transport = UlfmTransport(MPI.COMM_WORLD, cluster.layout, cluster.members, timeout_s)
    elif cluster.gossip_comm is not None:
        transport = MpiTransport(cluster.gossip_comm, timeout_s)
    else:
        store = PrefixStore("transport", cluster.store.store)
        if cluster.layout.even:
            transport = TorchTransport(store, cluster.shard, cluster.client, cluster.clients, timeout_s)
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
) -> VotingTransport:
    silence_s = config.cluster.timeout_s
    if visit is None:
        votes = open_votes(cluster.launch, cluster.layout, cluster.store, timeout_s, silence_s)
    else:
        votes = Votes(cluster.launch.rank, cluster.layout, visit.addresses, timeout_s, silence_s, visit.own, visit)
    guard.farewells.append(votes.close)
    guard.put_out_who_hangs = votes.stalled
    guard.cut_off, guard.return_s = votes.cut_off, max(guard.return_s, config.cluster.return_s)
    store, connected = guard.store.store, visit is None
    if cluster.layout.even:
        return VotingTransport(
            votes, store, cluster.shard, cluster.client, cluster.members, timeout_s, connected=connected
        )
    rank, ranks_of = cluster.launch.rank, cluster.layout.ranks_of
    with all_ranks_join(cluster.launch, timeout_s):
        return VotingTransport(
            votes, store, 0, rank, cluster.members, timeout_s, connected=connected, peers_of=ranks_of
        )

"""The way to the other clients, by how the job was launched and what it is to outlive."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial

from torch.distributed import PrefixStore

from deca_ds.config import Config
from deca_ds.elastic.client import QuorumClient, open_votes
from deca_ds.elastic.commit import SurvivorCommit
from deca_ds.elastic.reconnect_gloo import ReconnectingGloo
from deca_ds.elastic.reconnect_ulfm import ReconnectingUlfm
from deca_ds.elastic.rejoin import Visit
from deca_ds.launch import Cluster
from deca_ds.launch.progress import EVERYBODY
from deca_ds.transport.commit import Commit
from deca_ds.transport.gloo import GlooTransport
from deca_ds.transport.mpi import MpiTransport
from deca_ds.transport.transport import Endpoint, Transport
from deca_ds.watchdog.guard import JobGuard


@dataclass(frozen=True)
class Connected:
    """A rank's way to the other clients. survivors: where clients may die. rejoinable: where they may also come back,
    the transport, as what lets them in."""

    transport: Transport
    survivors: SurvivorCommit | None = None
    rejoinable: ReconnectingGloo | None = None

    @cached_property
    def commit(self) -> Commit:
        return self.survivors or Commit()


def connect_clients(config: Config, cluster: Cluster, guard: JobGuard, visit: Visit | None = None) -> Connected:
    """Join this rank with its peers in the other clients: over MPI where the launcher made an MPI world, else torch.

    visit: of a client that comes back; its transport is not connected until it is let in.
    """
    cluster.progress.enter("connecting the clients")
    cluster.progress.wait_for(EVERYBODY)
    timeout_s, outlives = cluster.progress.deadline_s(config.cluster.timeout_s), config.cluster.on_failure == "continue"
    end = Endpoint(
        cluster.layout,
        cluster.launch.rank,
        timeout_s,
        cluster.membership,
        cluster.progress,
        config.gossip.checksums,
    )
    announcement = partial(guard.site.announcement, layout=cluster.layout)
    if outlives and cluster.gossip_comm is None:
        votes = _open_votes(config, cluster, visit, timeout_s)
        gloo = ReconnectingGloo(votes, guard.site, announcement, end, connected=visit is None)
        connected = Connected(gloo, SurvivorCommit(gloo), gloo)
    elif outlives:
        from mpi4py import MPI

        ulfm = ReconnectingUlfm(MPI.COMM_WORLD, announcement, end)
        connected = Connected(ulfm, SurvivorCommit(ulfm))
    elif cluster.gossip_comm is not None:
        connected = Connected(MpiTransport(cluster.gossip_comm, end))
    else:
        connected = Connected(GlooTransport(PrefixStore("transport", cluster.store.store), end))
    cluster.progress.wait_for(None)
    return connected


def _open_votes(config: Config, cluster: Cluster, visit: Visit | None, timeout_s: float) -> QuorumClient:
    launch, layout, silence_s = cluster.launch, cluster.layout, config.cluster.timeout_s
    if visit is None:
        return open_votes(launch, layout, cluster.store, timeout_s, silence_s)
    return QuorumClient(launch.rank, layout, visit.addresses, timeout_s, silence_s, visit.own, visit)

"""The way to the other clients, by how the job was launched and what it is to outlive; and the job, once connected."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch.distributed import PrefixStore

from deca_ds.config import Config
from deca_ds.elastic import QuorumClient, ReconnectingGloo, ReconnectingUlfm, Rejoin, SurvivorCommit, open_votes
from deca_ds.gossip import MixingSchedule
from deca_ds.launch.progress import EVERYBODY
from deca_ds.launch.world import Cluster
from deca_ds.transport import Endpoint, GlooTransport, MpiTransport, Transport
from deca_ds.watchdog.guard import JobGuard
from deca_ds.watchdog.standing import Elasticity
from deca_ds.watchdog.stop import StopByCommit


@dataclass(frozen=True)
class Elastic:
    """What a job has in which clients may die and come back.

    commit: repeats work without dead clients. rejoinable: over torch, the transport, which lets clients in. stop: how
    the job is told to stop.
    """

    commit: SurvivorCommit
    rejoinable: ReconnectingGloo | None
    stop: StopByCommit


@dataclass(frozen=True)
class Connected:
    """A rank's way to the other clients. elastic: given if clients may die."""

    transport: Transport
    elastic: Elastic | None = None


@dataclass(frozen=True)
class Job:
    """What all parts of a run are made from, on one rank. mixing: of all clients of the configuration."""

    config: Config
    cluster: Cluster
    connected: Connected
    guard: JobGuard
    mixing: MixingSchedule

    @property
    def output(self) -> Path:
        return Path(self.config.run.output)

    @property
    def transport(self) -> Transport:
        """See Connected."""
        return self.connected.transport

    @property
    def elastic(self) -> Elastic | None:
        """See Connected."""
        return self.connected.elastic


def connect_clients(config: Config, cluster: Cluster, guard: JobGuard, rejoin: Rejoin | None = None) -> Connected:
    """Join this rank with its peers in the other clients: over MPI where the launcher made an MPI world, else torch.
    Where clients may die, the guard is told how the others continue.

    rejoin: of a client that comes back; its transport is not connected until it is let in.
    """
    cluster.progress.enter("connecting the clients")
    cluster.progress.wait_for(EVERYBODY)
    timeout_s = cluster.progress.deadline_s(config.cluster.timeout_s)
    end = Endpoint(
        cluster.layout,
        cluster.launch.rank,
        timeout_s,
        cluster.membership,
        cluster.progress,
        config.gossip.checksums,
    )
    if config.cluster.on_failure == "continue":
        connected = _connect_elastic(config, cluster, guard, rejoin, end)
    elif cluster.gossip_comm is not None:
        connected = Connected(MpiTransport(cluster.gossip_comm, end))
    else:
        connected = Connected(GlooTransport(PrefixStore("transport", cluster.store.store), end))
    cluster.progress.wait_for(None)
    return connected


def _connect_elastic(
    config: Config, cluster: Cluster, guard: JobGuard, rejoin: Rejoin | None, end: Endpoint
) -> Connected:
    announcement, stop = partial(guard.site.announcement, layout=cluster.layout), StopByCommit()
    if cluster.gossip_comm is not None:
        from mpi4py import MPI

        ulfm = ReconnectingUlfm(MPI.COMM_WORLD, announcement, end)
        guard.enter_elastic(Elasticity(cluster.membership, cluster.layout, stop))
        return Connected(ulfm, Elastic(SurvivorCommit(ulfm), None, stop))
    votes = _open_votes(config, cluster, rejoin, end.timeout_s)
    gloo = ReconnectingGloo(votes, guard.site, announcement, end, connected=rejoin is None)
    guard.on_exit(votes.close)
    guard.enter_elastic(
        Elasticity(
            cluster.membership,
            cluster.layout,
            stop,
            config.cluster.return_s,
            votes.cut_off,
            drop_hanging=votes.stalled,
        )
    )
    return Connected(gloo, Elastic(SurvivorCommit(gloo), gloo, stop))


def _open_votes(config: Config, cluster: Cluster, rejoin: Rejoin | None, timeout_s: float) -> QuorumClient:
    launch, layout, silence_s = cluster.launch, cluster.layout, config.cluster.timeout_s
    if rejoin is None:
        return open_votes(launch, layout, cluster.store, timeout_s, silence_s)
    return QuorumClient(launch.rank, layout, rejoin.addresses, timeout_s, silence_s, rejoin.own, rejoin)

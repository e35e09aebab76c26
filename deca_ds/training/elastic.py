"""Make a run one in which clients may go and come: what the guard, the transport and the other clients know of it."""

from __future__ import annotations

from dataclasses import dataclass

from deca_ds.data import ClientData
from deca_ds.elastic.agent import ElasticAgent
from deca_ds.elastic.commit import SurvivorCommit
from deca_ds.elastic.invitation import Invitation
from deca_ds.elastic.partition import Lookout
from deca_ds.elastic.reconnect_gloo import ReconnectingGloo
from deca_ds.elastic.rejoin import save_addresses
from deca_ds.gossip.gossip import Gossip
from deca_ds.launch.compare import software
from deca_ds.launch.view import View
from deca_ds.training.connect import Connected
from deca_ds.training.metrics import Metrics
from deca_ds.training.start import Job
from deca_ds.watchdog.lifelines import Lifeline
from deca_ds.watchdog.role import Elasticity
from deca_ds.watchdog.stop import StopByCommit


@dataclass(frozen=True)
class Elastic:
    """commit: what outlives dead clients. rejoinable: over torch, the transport, which lets clients in. stop: how the
    job is told to stop."""

    commit: SurvivorCommit
    rejoinable: ReconnectingGloo | None
    stop: StopByCommit


def enter_elastic(job: Job, connected: Connected) -> Elastic | None:
    """Tell the guard how the others go on when a client fails; None where the job ends then."""
    cluster, guard, stop = job.cluster, job.guard, StopByCommit()
    if connected.survivors is None:
        return None
    elastic = Elastic(connected.survivors, connected.rejoinable, stop)
    if connected.rejoinable is None:
        guard.enter_elastic(Elasticity(cluster.membership, cluster.layout, stop))
        return elastic
    votes, return_s = connected.rejoinable.votes, job.config.cluster.return_s
    guard.on_exit(votes.close)
    guard.enter_elastic(
        Elasticity(cluster.membership, cluster.layout, stop, return_s, votes.cut_off, put_out_who_hangs=votes.stalled)
    )
    return elastic


def make_agent(job: Job, elastic: Elastic, gossip: Gossip, metrics: Metrics) -> ElasticAgent:
    """What goes on without clients that have died. From here on a rank that dies takes its client along."""
    cluster, config = job.cluster, job.config.cluster
    assert cluster.client_store is not None, "`connect` opens it"
    lifeline = Lifeline(cluster.client_store, cluster.shard, cluster.ranks, config.timeout_s, job.guard.fail)
    job.guard.on_exit(lifeline.close)
    lookout = None
    if elastic.rejoinable is not None and cluster.is_leader and config.return_s:
        lookout = Lookout(cluster.membership, elastic.rejoinable.votes, cluster.client, config.min_clients)
    way = elastic.commit, elastic.rejoinable
    return ElasticAgent(config, cluster, *way, gossip, job.mixing, metrics, elastic.stop, lookout)


def invite_others(job: Job, elastic: Elastic, attempt: int, data: ClientData, vocabulary: str, rounds: int) -> None:
    """Over torch: keep up to date what a client that comes back finds in the folder, and what this client's coordinator
    tells it. vocabulary: digest of the tokenizer's. rounds: of the run."""
    config, guard = job.config, job.guard
    if elastic.rejoinable is None or not job.cluster.is_leader:
        return
    votes = elastic.rejoinable.votes
    told = {
        "attempt": attempt,
        "software": software(config, [matrix.tobytes() for matrix in job.mixing.matrices]),
        "tokenizer": vocabulary,
        "label_names": data.label_names,
        "common_evaluation": data.summary["common_evaluation"],
        "rounds": rounds,
        "date": config.data.date,
    }

    def invite(*_: View) -> None:
        save_addresses(job.output, votes.addresses)
        store = guard.store.address
        if votes.own is not None and store is not None:
            addresses = [(client, *address) for client, address in votes.addresses.items()]
            votes.own.invite(Invitation(store, guard.site.host, addresses, **told).text())

    invite()
    job.cluster.membership.subscribe(invite)

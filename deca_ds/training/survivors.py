"""What else changes on a rank when clients have died and the others go on: matrices, duties, and where the store is."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from deca_ds.cluster import Cluster
from deca_ds.cluster.guard import JobGuard
from deca_ds.cluster.stop import StopQuestion
from deca_ds.cluster.store import JobStore, host_again, join_again
from deca_ds.gossip import survive
from deca_ds.gossip.mix import Gossip
from deca_ds.gossip.schedule import MixingSchedule
from deca_ds.gossip.surviving import Question, Surviving
from deca_ds.training.metrics import Metrics


@dataclass
class Survivors:
    """Listens to the transport. mixing: the matrices that the run was started with."""

    cluster: Cluster
    transport: Surviving
    gossip: Gossip
    mixing: MixingSchedule
    metrics: Metrics
    guard: JobGuard
    stop: StopQuestion
    _hosted: JobStore | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.transport.questions.append(Question(self.stop.answer, self.stop.heard))
        self.transport.news, self.transport.changed = self._news, self._changed

    def _news(self) -> str:
        """This rank speaks for the survivors, as far as it knows: the address of the store, if it had to host one."""
        if self.guard.host >= self.cluster.launch.rank:  # it was the first of all, too, when it became the host
            return ""
        self._hosted = self._hosted or host_again(self.guard.store)
        assert self._hosted.address is not None
        return "{} {}".format(*self._hosted.address)

    def _changed(self, news: str) -> None:
        members, cluster = self.cluster.members, self.cluster
        store = None
        if news:
            host, port = news.split()
            own = cluster.is_main and self._hosted is not None
            store = self._hosted if own else join_again(self.guard.store, (host, int(port)))
            assert store is not None
            self.transport.store = store.store
        k = cluster.ranks
        self.guard.survive([client * k + shard for client in members.clients for shard in range(k)], store)
        mixing = survive.without(self.mixing, members.missing)
        parts = survive.parts(mixing, members.clients)
        gap = survive.spectral_gap(mixing, members.clients)
        self.gossip.schedule = mixing
        gone = f"client{'s' * (len(members.missing) > 1)} {', '.join(map(str, members.missing))} gone"
        verdict = f"{len(members)} of {members.total} go on, spectral gap {gap:.4g}"
        if len(parts) > 1:
            self.stop.stop()
            verdict = f"{' and '.join(map(str, parts))} do not reach each other any more: stopping"
        elif len(members) < 2:
            self.stop.stop()
            verdict = f"nobody is left for client {members.first} to average with: stopping"
        if cluster.is_main:
            print(f"WARNING: {cluster.progress.place}: {gone}; {verdict}", file=sys.stderr, flush=True)
        self.metrics.membership(
            cluster.progress.step,
            {"clients": list(members.clients), "missing": list(members.missing), "spectral_gap": gap, "parts": parts},
        )

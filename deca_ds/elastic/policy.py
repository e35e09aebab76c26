"""What else changes on a rank when clients die or come back: matrices, duties, where the store is, and whose state."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from deca_ds.config.schema import ClusterConfig
from deca_ds.elastic.commit import Question, Surviving
from deca_ds.elastic.handover import receive, send
from deca_ds.elastic.partition import Lookout
from deca_ds.elastic.reconnect_gloo import ReconnectingGloo
from deca_ds.engine.state import TrainingState
from deca_ds.gossip import subset
from deca_ds.gossip.averaging import Gossip
from deca_ds.gossip.schedule import MixingSchedule
from deca_ds.launch import Cluster
from deca_ds.launch.store import JobStore, host_again, join_again
from deca_ds.watchdog.guard import JobGuard
from deca_ds.watchdog.stop import StopByCommit


class Records(Protocol):
    """Where the job's records go (training/metrics.py)."""

    def membership(self, step: int, record: dict[str, Any]) -> None: ...

    def job(self, kind: str, step: int, record: dict[str, Any]) -> None: ...


@dataclass
class Survivors:
    """Listens to the transport, which where clients differ in size is the one under gossip's. config: when to stop.
    mixing: the matrices that the run was started with. invite: over torch, brings what clients that come back are told
    up to date. lookout: on leaders, with cluster.return_s. returns: whether this client ends its training here to join
    the others."""

    config: ClusterConfig
    cluster: Cluster
    transport: Surviving
    gossip: Gossip
    mixing: MixingSchedule
    metrics: Records
    guard: JobGuard
    stop: StopByCommit
    invite: Callable[[], None] | None = None
    lookout: Lookout | None = None
    returns: bool = field(default=False, init=False)
    _hosted: JobStore | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._before = self.cluster.members.clients
        self.transport.questions.append(Question(self.stop.answer, self.stop.heard))
        if self.config.return_s:
            self.transport.questions.append(Question(self._goes_first, self._heard_of_another))
        self.transport.news, self.transport.changed = self._news, self._changed

    def begin(self, done: int) -> None:
        """After `done` inner steps, at the start of this attempt at the run: with those that are there."""
        if self.cluster.members.missing:
            self.cluster.progress.enter("starting", step=done)
            self._regroup(f"{_clients(self.cluster.members.missing)} absent", done + 1)

    def admit(self, state: TrainingState) -> None:
        """Between two inner steps: let in whom the last agreement has announced, and give it what it needs."""
        if isinstance(self.transport, ReconnectingGloo) and self.transport.joining:
            newcomers = self.transport.joining
            self.cluster.progress.enter("letting a client in")
            self.transport.admit()
            for client in newcomers:
                self.transport.together(partial(self._hand_over, client, state))
                if client in self.cluster.members.clients:
                    record = {"from_step": state.done + 1, "to": client, "by": self._giver(client), "time": _now()}
                    self.metrics.job("handover", state.done, record)

    def enter(self, state: TrainingState) -> None:
        """For a client that comes back: wait until it is let in, and take over where training stands."""
        assert isinstance(self.transport, ReconnectingGloo)
        self.cluster.progress.enter("waiting to be let in")
        self.transport.enter()
        self.cluster.progress.enter("taking over")
        self.transport.admit()
        self.transport.together(lambda: receive(self.gossip.transport, self._giver(self.cluster.client), state))
        if state.stopping:
            self.stop.stop()

    def _goes_first(self) -> bool:
        """Whether no other part of the network is known to which this one has to come."""
        return self.lookout is None or not self.lookout.found

    def _heard_of_another(self, all_say_no: bool) -> None:
        if not all_say_no and not self.returns:
            self.returns = True
            self.stop.stop()
            if self.cluster.is_job_leader:
                members = _clients(sorted(self.cluster.members.clients))
                print(f"WARNING: {self.cluster.progress.place}: the larger part of the network is in reach again: "
                      f"{members} will join it", file=sys.stderr, flush=True)  # fmt: skip

    def _hand_over(self, to: int, state: TrainingState) -> None:
        if to in self.cluster.members.clients and self.cluster.client == self._giver(to):
            send(self.gossip.transport, to, state)

    def _giver(self, to: int) -> int:
        """Who gives client `to` its state: the first neighbour that averages with it, else the first member."""
        mixing, members = self.gossip.schedule, self.cluster.members
        sources = {j for t in range(mixing.period) for j in mixing.sources(to, t)}
        return next((client for client in members.clients if client in sources), members.first)

    def _news(self) -> str:
        """This rank speaks for the survivors: the address of a store, if it has to host one."""
        if self.cluster.layout.client_of(self.guard.host) in self.cluster.members.clients:
            return ""
        self._hosted = self._hosted or host_again(self.guard.store)
        assert self._hosted.address is not None
        return "{} {}".format(*self._hosted.address)

    def _changed(self, news: str) -> None:
        members, cluster, before = self.cluster.members, self.cluster, self._before
        self._before = members.clients
        store = None
        if news:
            host, port = news.split()
            own = cluster.is_job_leader and self._hosted is not None
            store = self._hosted if own else join_again(self.guard.store, (host, int(port)))
            assert store is not None
            self.transport.store = store.store
        ranks = [rank for client in members.clients for rank in cluster.layout.ranks_of(client)]
        self.guard.survive(ranks, store)
        back = [client for client in members.clients if client not in before]
        # the inner step under way is averaged again, or for the first time
        from_step = cluster.progress.step + (cluster.progress.phase not in ("gradient", "gossip"))
        self._regroup(f"{_clients(back)} back" if back else f"{_clients(members.missing)} gone", from_step)

    def _regroup(self, who: str, from_step: int) -> None:
        """Average among `members`, without the missing ones."""
        members, cluster = self.cluster.members, self.cluster
        mixing = subset.without(self.mixing, members.missing)
        parts = subset.parts(mixing, members.clients)
        gap = subset.spectral_gap(mixing, members.clients)
        self.gossip.schedule = mixing
        if self.invite is not None:
            self.invite()
        verdict = f"{len(members)} of {members.total} go on, spectral gap {gap:.4g}"
        if len(members) < self.config.min_clients:
            self.stop.stop()
            self.returns = self.config.return_s > 0
            verdict = f"{len(members)} of {members.total} are left, fewer than cluster.min_clients: stopping"
        elif len(parts) > 1:
            verdict = f"{' and '.join(map(str, parts))} do not reach each other any more: "
            verdict += "each part goes on by itself" if self.config.on_partition == "continue" else "stopping"
            if self.config.on_partition == "stop":
                self.stop.stop()
        if cluster.is_job_leader:
            print(f"WARNING: {cluster.progress.place}: {who}; {verdict}", file=sys.stderr, flush=True)
        self.metrics.membership(
            cluster.progress.step,
            {
                "from_step": from_step,
                "clients": sorted(members.clients),
                "missing": list(members.missing),
                "spectral_gap": gap,
                "parts": parts,
                "time": _now(),
            },
        )


def _now() -> float:
    """Seconds since 1970, to tell apart what happened in one inner step."""
    return round(time.time(), 3)


def _clients(numbers: Sequence[int]) -> str:
    return f"client{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"

"""What a rank does when the view changes: it adapts the matrices, obeys the failure policy, and hands its state over to
rejoining clients."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from deca_ds.config.schema import ClusterConfig
from deca_ds.elastic.handover import receive, send
from deca_ds.elastic.network_partition import Lookout
from deca_ds.elastic.policy import Action, Situation, decide
from deca_ds.elastic.reconnect_gloo import ReconnectingGloo
from deca_ds.elastic.survivor_commit import Question, SurvivorCommit
from deca_ds.engine.state import TrainingState
from deca_ds.gossip import MixingSchedule, subset
from deca_ds.gossip.gossip import Gossip
from deca_ds.launch.view import View
from deca_ds.launch.world import Cluster
from deca_ds.plural import named
from deca_ds.printing import print_wrapped
from deca_ds.watchdog.stop import StopByCommit


class Records(Protocol):
    """Where the job's records go (training/metrics.py)."""

    def membership(self, step: int, record: dict[str, Any]) -> None:
        """Log the members after a change."""

    def job(self, kind: str, step: int, record: dict[str, Any]) -> None:
        """Log another event that concerns all clients."""


@dataclass
class ElasticAgent:
    """Subscribes to changes of the view, and adds its questions to every agreement of the commit.

    rejoinable: the transport over torch, which lets clients in; None over MPI. mixing: the matrices from the start of
    the run. lookout: on leaders, with cluster.return_s. rejoins: whether this client stops training here to rejoin the
    others.
    """

    config: ClusterConfig
    cluster: Cluster
    commit: SurvivorCommit
    rejoinable: ReconnectingGloo | None
    gossip: Gossip
    mixing: MixingSchedule
    metrics: Records
    stop: StopByCommit
    lookout: Lookout | None = None
    rejoins: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.commit.also_ask(Question(self.stop.answer, self.stop.heard))
        if self.config.return_s:
            self.commit.also_ask(Question(self._goes_first, self._heard_of_another))
        self.cluster.membership.subscribe(self._view_changed)

    def begin(self, done: int) -> None:
        """Begin this attempt at the run, after `done` inner steps, with the clients that are present."""
        if self.cluster.members.missing:
            self.cluster.progress.enter("starting", step=done)
            self._regroup(f"{named('client', self.cluster.members.missing)} absent", done + 1)

    def let_in(self, state: TrainingState) -> None:
        """Between two inner steps: let in the clients that the last agreement announced, and hand the state over."""
        if self.rejoinable is not None and self.rejoinable.joining:
            newcomers = self.rejoinable.joining
            self.cluster.progress.enter("letting a client in")
            self.rejoinable.connect_joining()
            for client in newcomers:
                self.commit.run(partial(self._hand_over, client, state))
                if client in self.cluster.members:
                    record = {"from_step": state.done + 1, "to": client, "by": self._giver(client), "time": _now()}
                    self.metrics.job("handover", state.done, record)

    def wait_for_admission(self, state: TrainingState) -> None:
        """On a rejoining client, wait until it is let in, and take over a neighbour's state."""
        assert self.rejoinable is not None
        self.cluster.progress.enter("waiting to be let in")
        self.rejoinable.wait_for_admission()
        self.cluster.progress.enter("taking over")
        self.rejoinable.connect_joining()
        self.commit.run(lambda: receive(self.gossip.transport, self._giver(self.cluster.client), state))
        if state.stopping:
            self.stop.stop()

    def _hand_over(self, to: int, state: TrainingState) -> None:
        if to in self.cluster.members and self.cluster.client == self._giver(to):
            send(self.gossip.transport, to, state)

    def _giver(self, to: int) -> int:
        """Return the client that hands its state to client `to`: its first neighbour among the members, else the first
        member."""
        mixing, members = self.gossip.schedule, self.cluster.members
        sources = {j for t in range(mixing.period) for j in mixing.sources(to, t)}
        return next((client for client in members.clients if client in sources), members.first)

    def _goes_first(self) -> bool:
        """Return whether this rank knows of no other part of the network that this part has to join."""
        return self.lookout is None or not self.lookout.found

    def _heard_of_another(self, all_say_no: bool) -> None:
        if not all_say_no and not self.rejoins:
            view = self.cluster.members
            self._warn(self._obey(Situation(view, subset.parts(self.gossip.schedule, view.clients), larger_part=True)))

    def _view_changed(self, before: View, view: View) -> None:
        back = [client for client in view.clients if client not in before]
        progress = self.cluster.progress
        # the members average the current inner step again, or for the first time
        from_step = progress.step + (progress.phase not in ("gradient", "gossip"))
        self._regroup(f"{named('client', back)} back" if back else f"{named('client', view.missing)} gone", from_step)

    def _regroup(self, who: str, from_step: int) -> None:
        """Restrict averagings to the members from now on, and obey the policy."""
        view = self.cluster.members
        mixing = subset.without(self.mixing, view.missing)
        parts = subset.parts(mixing, view.clients)
        gap = subset.spectral_gap(mixing, view.clients)
        self.gossip.average_by(mixing)
        why = self._obey(Situation(view, parts))
        self._warn(f"{who}; {why or f'{len(view)} of {view.total} continue, spectral gap {gap:.4g}'}")
        self._record(view, parts, gap, from_step)

    def _obey(self, now: Situation) -> str:
        """Obey the policy, and return its reason."""
        verdict = decide(now, self.config)
        if verdict.action is not Action.CONTINUE:
            self.rejoins |= verdict.action is Action.REJOIN
            self.stop.stop()
        return verdict.why

    def _warn(self, text: str) -> None:
        if self.cluster.is_job_leader:
            print_wrapped(f"WARNING: {self.cluster.progress.place}: {text}")

    def _record(self, view: View, parts: Sequence[Sequence[int]], gap: float, from_step: int) -> None:
        self.metrics.membership(
            self.cluster.progress.step,
            {
                "from_step": from_step,
                "clients": sorted(view.clients),
                "missing": list(view.missing),
                "spectral_gap": gap,
                "parts": parts,
                "time": _now(),
            },
        )


def _now() -> float:
    """Return seconds since 1970, to distinguish events of one inner step."""
    return round(time.time(), 3)

"""ReconnectingGloo: messages over gloo that outlive dead clients, by votes at a coordinator (elastic/protocol.py).

Gloo cannot remove clients from a group, and cannot interrupt a wait. So a thread waits for each message while the rank
watches for the loss of a client, and after a loss the survivors form a new group. The old group's threads keep its
pending operations: gloo may write into their buffers as long as the connections last.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta

from torch import Tensor
from torch.distributed import ProcessGroupGloo

from deca_ds.elastic.decision import YES, Decision
from deca_ds.elastic.quorum_client import QuorumClient
from deca_ds.elastic.survivor_commit import answers_in, bits
from deca_ds.elastic.unreachable import Attempts, pairs_apart, vote
from deca_ds.errors import GossipError, MessageError
from deca_ds.launch.progress import EVERYBODY, Progress
from deca_ds.launch.store_site import StoreSite
from deca_ds.launch.view import View
from deca_ds.plural import named
from deca_ds.transport import Endpoint, GlooTransport, TorchExchange

_CONNECT_S = 30.0  # for the survivors, which have just agreed, to connect in a new group
_LOOK_S = 0.02  # between two looks at whether a client was dropped


class ReconnectingGloo(GlooTransport):
    """See GlooTransport and Reconnecting; it can also let rejoining clients in, and keeps the end's membership current.

    site: where the store is through which they connect. announcement: what the leader of the first client of a new view
    tells the others. connected: False for a rejoining client, until it is let in.
    """

    def __init__(
        self,
        votes: QuorumClient,
        site: StoreSite,
        announcement: Callable[[View], str],
        end: Endpoint,
        *,
        connected: bool = True,
    ):
        super().__init__(site.store.store, end, connected=connected)
        self.votes, self._site, self._announcement = votes, site, announcement
        self._announced: Decision | None = None  # the last decision to which all members have agreed

    @property
    def joining(self) -> tuple[int, ...]:
        """The clients that the last agreement has let in, for `connect_joining`."""
        return () if self._announced is None else tuple(client for client, _, _ in self._announced.joining)

    def wait_for_admission(self) -> None:
        """On a rejoining client, wait until the others let it in."""
        with self.progress.waiting(EVERYBODY):
            self._announced = self.votes.wait_for_admission()

    def connect_joining(self) -> None:
        """Connect the clients in `joining` with the others; all of them call this. Afterwards `members` says which
        clients are in."""
        assert self._announced is not None
        announced, self._announced, self._group = self._announced, None, None
        with self.progress.waiting(EVERYBODY):
            self.membership.change(View(announced.number, announced.everybody, self.members.total))
            if not self._meet(announced.number, Attempts()):
                self.reconnect()
        self.epoch += 1

    def _exchange(
        self, send: Tensor, destinations: Sequence[int], receives: Mapping[int, Tensor], tag: int
    ) -> VotingExchange:
        """See Transport."""
        if self._group is None and (receives or destinations):
            raise MessageError(f"the messages with tag {tag} are given up: a client has gone")
        return VotingExchange(self, self._start(send, destinations, receives, tag), tag)

    def give_up(self) -> None:
        """See Reconnecting."""
        self._group = None

    def agree(self, answers: Sequence[bool]) -> list[bool]:
        """See Reconnecting."""
        decision = self._vote(bits(answers))
        if decision.clients != self.members.clients:
            return []
        self._announced = decision
        return answers_in(decision.yes, len(answers))

    def _vote(self, yes: int, announcement: str = "") -> Decision:
        decision = self.votes.vote(yes, announcement)
        self.progress.tick()
        return decision

    def reconnect(self) -> bool:
        """See Reconnecting."""
        before, attempts = self.members, Attempts()
        while True:
            self._group = None
            view = View(before.number + 1, self.votes.clients, before.total)
            announces = self.rank == self.layout.leader_of(view.first)
            decision = self._vote(YES, self._announcement(view) if announces else "")
            if decision.clients != view.clients:  # one more was lost, perhaps the one with the announcement
                continue
            if view.clients != self.members.clients:
                self.membership.change(replace(view, number=decision.number, announcement=decision.announcement))
            if self._meet(decision.number, attempts):
                break
        self.epoch += 1
        return self.members != before

    def _meet(self, number: int, attempts: Attempts) -> bool:
        """Try to connect all members in a new group; returns whether that has worked. number: of the agreement that it
        follows.

        Raises CutOffError if this client leaves, because some others cannot reach it.
        """
        clients, total, own = self.members.clients, self.members.total, self.votes.client
        through = self._connect_again(number)
        decision = self._vote(vote(through, own, () if through else self.votes.out_of_reach(), total))
        if decision.clients != clients:
            return False
        if not decision.yes & YES:
            apart = pairs_apart(decision.yes, clients, total)
            if own in attempts.failed(clients, apart):
                others = sorted(sum(pair) - own for pair in apart if own in pair)
                self.votes.leave(f"client {own} and {named('client', others)} cannot reach each other")
            return False
        return True

    def _connect_again(self, number: int) -> bool:
        """Try to connect this rank in a new group; returns whether that has worked."""
        if len(self.members) == 1:
            return True
        store = self._key(self._site.store.store, number)
        # less than the time after which a waiting rank may be taken for a hanging one
        seconds = min(_CONNECT_S, (self.progress.timeout_s or 2 * _CONNECT_S) / 2)
        peers, met = self.peers, list[ProcessGroupGloo]()

        def connect() -> None:
            with contextlib.suppress(GossipError):  # one more client is lost, or the store
                met.append(self._connect(store, peers, timedelta(seconds=seconds)))

        # gloo may take far longer where packets are lost without a word
        thread, deadline = threading.Thread(target=connect, daemon=True), time.monotonic() + seconds
        thread.start()
        while thread.is_alive() and time.monotonic() < deadline and not self.votes.interrupted.is_set():
            thread.join(_LOOK_S)
        self.progress.tick()
        self._group = met[0] if met else None
        return bool(met)


class VotingExchange(TorchExchange):
    """See TorchExchange; a wait ends when a client is dropped."""

    _transport: ReconnectingGloo

    def wait(self) -> None:
        """See Exchange."""
        progress, seen = self._transport.progress, Progress()  # the thread may outlive this wait
        moved, waiter = seen.moved, self._in_thread(seen)
        while self._works and waiter.is_alive():
            if self._transport.votes.interrupted.is_set():
                raise MessageError(f"the messages with tag {self._tag} are given up: a client has gone")
            waiter.join(_LOOK_S)
            progress.wait_for(seen.awaits)
            if seen.moved > moved:
                moved = progress.moved = seen.moved
        super().wait()

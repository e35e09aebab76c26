"""ReconnectingGloo: messages over gloo that outlive dead clients, by votes at a coordinator (elastic/protocol.py).

Gloo cannot take clients out of a group, nor be told to stop waiting. So a thread waits for each message, the rank looks
meanwhile whether a client has gone, and after a death the survivors make a new group. What was under way in the old one
is left to its threads: gloo may write into its buffers as long as the connections last.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta

from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, Store

from deca_ds.elastic.agreement import YES, Decision
from deca_ds.elastic.client import QuorumClient
from deca_ds.elastic.commit import Surviving, answers_in, bits
from deca_ds.elastic.reach import Attempts, pairs_apart, vote
from deca_ds.errors import GossipError
from deca_ds.launch.members import Members
from deca_ds.launch.progress import EVERYBODY, Progress
from deca_ds.transport.gloo import GlooTransport, TorchExchange
from deca_ds.transport.transport import lost

_CONNECT_S = 30.0  # for the survivors, who have just agreed, to meet in a new group
_LOOK_S = 0.02  # between two looks at whether a client has gone


class ReconnectingGloo(GlooTransport, Surviving):
    """See GlooTransport; `together` outlives dead clients, and those that come back can be let in.

    shard, client: what makes this rank's connections, and its number there; 0 and the rank's own number, with
    layout.ranks_of as peers_of, where they join all ranks (transport/uneven.py). members: what is kept up to date.
    connected: False for a client that comes back, until it is let in. joining: clients that the last agreement has let
    in, for `admit`.
    """

    def __init__(
        self,
        votes: QuorumClient,
        store: Store,
        shard: int,
        client: int,
        members: Members,
        timeout_s: float,
        *,
        connected: bool = True,
        peers_of: Callable[[int], Sequence[int]] | None = None,
    ):
        super().__init__(store, shard, client, members.total, timeout_s, connected=False)
        self.votes, self.store, self._shard = votes, store, shard
        self.members, self.peers_of = members, peers_of or self.peers_of
        self.joining: tuple[int, ...] = ()
        if connected and len(members) > 1:
            prefixed = PrefixStore(f"gossip/{shard}", store)
            self._group = self._connect(prefixed, self._place(client), len(self._peers), timedelta(seconds=timeout_s))

    def enter(self) -> None:
        """For a client that comes back: wait until the others let it in."""
        with self.progress.waiting(EVERYBODY):
            decision = self.votes.enter()
        self.members.clients, self.joining = decision.clients, decision.everybody[len(decision.clients) :]
        self._announced = decision.number

    def admit(self) -> None:
        """Connect those that are `joining` with the others; all of them call this. `members` says who has come in."""
        self.members.clients, self.joining = (*self.members.clients, *self.joining), ()
        self._group = None
        with self.progress.waiting(EVERYBODY):
            self.changed("")
            if not self._meet(self._announced, Attempts()):
                self._rebuild()
        self._epoch += 1

    def _exchange(
        self, send: Tensor, destinations: Sequence[int], receives: Mapping[int, Tensor], tag: int
    ) -> VotingExchange:
        """See PointToPoint."""
        if self._group is None and (receives or destinations):
            raise lost(self.client, [*receives, *destinations][0], "from", tag, "a client has gone")
        return VotingExchange(self, self._start(send, destinations, receives, tag), tag)

    def _give_up(self) -> None:
        self._group = None

    def _agree(self, answers: Sequence[bool]) -> list[bool]:
        decision = self._vote(bits(answers))
        if decision.clients != self.members.clients:
            return []
        self.joining, self._announced = decision.everybody[len(decision.clients) :], decision.number
        return answers_in(decision.yes, len(answers))

    def _vote(self, yes: int, news: str = "") -> Decision:
        decision = self.votes.vote(yes, news)
        self.progress.tick()
        return decision

    def _rebuild(self) -> bool:
        before, told, attempts = self.members.clients, True, Attempts()
        while True:
            self._group = None
            decided = self.votes.clients
            told, self.members.clients = told and decided == self.members.clients, decided
            speaks = self.client == self._peers[0] and self._shard == 0
            decision = self._vote(YES, self.news() if speaks else "")
            if decision.clients != decided:  # one more: perhaps the one that had something to tell
                continue
            if not told:
                self.changed(decision.news)
                told = True
            if self._meet(decision.number, attempts):
                break
        self._epoch += 1
        return self.members.clients != before

    def _meet(self, number: int, attempts: Attempts) -> bool:
        """Whether the members, all of them, have met in a new group. number: of the agreement that it follows.

        Raises CutOffError if this client leaves, because some cannot reach it.
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
                self.votes.leave(f"client {own} and client {', '.join(map(str, others))} cannot reach each other")
            return False
        return True

    def _connect_again(self, number: int) -> bool:
        """See `_meet`, for this rank."""
        if len(self.members) == 1:
            return True
        assert self.store is not None
        store = PrefixStore(f"gossip/{self._shard}/{number}", self.store)
        # less than the time after which somebody who waits may be taken for one that hangs
        seconds = min(_CONNECT_S, (self.progress.timeout_s or 2 * _CONNECT_S) / 2)
        place, size, met = self._place(self.client), len(self._peers), list[ProcessGroupGloo]()

        def connect() -> None:
            with contextlib.suppress(GossipError):  # one more is gone, or the store
                met.append(self._connect(store, place, size, timedelta(seconds=seconds)))

        # gloo may take far longer where packets are lost without a word
        thread, deadline = threading.Thread(target=connect, daemon=True), time.monotonic() + seconds
        thread.start()
        while thread.is_alive() and time.monotonic() < deadline and not self.votes.interrupted.is_set():
            thread.join(_LOOK_S)
        self.progress.tick()
        self._group = met[0] if met else None
        return bool(met)


class VotingExchange(TorchExchange):
    """See TorchExchange; it ends when a client has gone."""

    _transport: ReconnectingGloo

    def wait(self) -> None:
        """See Exchange."""
        progress, seen = self._transport.progress, Progress()  # the thread may outlive this wait
        moved, waiter = seen.moved, self._in_thread(seen)
        while self._works and waiter.is_alive():
            if self._transport.votes.interrupted.is_set():
                direction, neighbour, _ = self._works[0]
                raise lost(self._transport.client, neighbour, direction, self._tag, "a client has gone")
            waiter.join(_LOOK_S)
            progress.wait_for(seen.awaits)
            if seen.moved > moved:
                moved = progress.moved = seen.moved
        super().wait()

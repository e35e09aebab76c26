"""The membership protocol: all ranks agree on what counts and on who is in, while clients die, hang and come back.

This module has a coordinator's part, voter.py a rank's. Both are states that change with a message, the end of a
connection or the passing of time, and say what to send. Time is a parameter, in seconds of any clock that does not go
back. Sockets, threads and clocks are in quorum_server.py, quorum_client.py and wire.py, so that tests drive whole jobs
through faults in no time.

Each client's leader has a coordinator. One of them at a time is at work, at the start that of client 0. Every rank
keeps a connection to it. Messages are JSON objects of a few hundred bytes:

    rank to coordinator    hello (rank, the last decision that it knows, coordinators that it has lost), vote, goodbye,
                           leave (its client does), stalled (it has voted, and for cluster.timeout_s nobody in the job
                           has moved on)
    coordinator to rank    welcome, interrupt (the next decision will not be a yes), decision, out (you are), alive
    of a returning client  join, ready; to it: invitation, asleep (another one is the coordinator), addresses (of all)
    of another part        who; to it: part (the clients that are in, none if this coordinator is not at work)

1. All ranks of all clients that are in vote under one number. The decision is the AND of their answers, bit by bit.
2. A connection that ends without a goodbye puts its client out. The next decision names the clients that are left.
   Whoever votes no, or such a loss, interrupts all at once, so that nobody waits for messages that will not come.
3. When the coordinator itself is lost, every rank says hello to the leader of the next client. Its coordinator begins
   as soon as its own rank has come, which has lost the old one then, too; those who have not come after a while are
   out. Whoever misses a decision that another rank knows is given it: nobody is further apart than one, because a
   decision takes the votes of all who know the one before. Who knows less has been out meanwhile.
4. A client that has gone may come back, as new processes. When all its ranks are ready, the next decision to which all
   have voted yes and OPEN announces it. From the agreement after that one on it votes like the others. It stands at the
   end of the line of those who become coordinator, so that it takes nobody's place.
5. A client that hangs is put out like one that has gone: when somebody is stalled all others are interrupted, and whose
   votes are still missing then is out. A coordinator that gives no sign of life for cluster.timeout_s is lost. One that
   finds its own client hanging, or that was stopped itself for so long, closes all connections: then it is lost, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from deca_ds.elastic.agreement import OPEN, YES, Decision
from deca_ds.launch import ClientLayout

GRACE_S = 20.0  # for the others to notice that the old coordinator is lost; a silent host takes them about 11 s
ALIVE_S = 5.0  # at most, between two signs of life of a coordinator
_PATIENCE_S = 5.0  # for those who do not hang to hear that somebody does, and to vote
_HANGING_S = 3.0  # a rank that hears of no progress says so every second

Message = dict[str, Any]
Sends = list[tuple[int, Message]]  # connection and message


@dataclass
class _Peer:
    """At the other end of a connection. rank: who it is. known: number of the last decision sent to it.
    Of a returning client, ready: whether it only waits to come in; address: of its coordinator, from its leader; store:
    address of the job's when it was invited."""

    connection: int
    rank: int
    known: int = -1
    ready: bool = False
    address: tuple[str, int] | None = None
    store: tuple[str, int] | None = None


class Coordinator:
    """Of client `client`. timeout_s: for all ranks to come at the start of the job, which is that of `clients`.
    silence_s: after so long without a sign of life a coordinator is lost.

    Connections have numbers, which whoever holds them chooses. last: the last decision that it knows. invitation: what
    a returning client has to know. retired: whether all connections are to be closed, for good.
    """

    def __init__(
        self, layout: ClientLayout, client: int, clients: Sequence[int], timeout_s: float, silence_s: float, now: float
    ):
        self._layout, self._leader = layout, layout.leader_of(client)
        self._timeout_s, self._silence_s = timeout_s, silence_s
        self.last = Decision(0, 0, "", tuple(clients))
        self.invitation: Message | None = None
        self.retired = False
        self._at_work = False
        self._gone: set[int] = set()  # put out after the last decision
        self._peers: dict[int, _Peer] = {}  # by connection
        self._lines: dict[int, _Peer] = {}  # by rank: those that are in
        self._visitors: dict[int, _Peer] = {}  # by rank: of clients that want to come back
        self._visits = 0
        self._done: set[int] = set()  # ranks that have said goodbye
        self._votes: dict[int, tuple[int, str]] = {}
        self._gathered: float | None = None  # after which nobody is waited for who has never come
        self._stalled: tuple[float, float] | None = None  # when somebody was so first, of late, and last
        self._signed = now  # when it gave the last sign of life
        self._sends: Sends = []

    @property
    def clients(self) -> list[int]:
        """Who is in, once it is at work, in the order in which they become coordinator."""
        return [client for client in self.last.everybody if client not in self._gone] if self._at_work else []

    def invite(self, invitation: Message) -> None:
        """What clients that come back are told from now on has changed."""
        self.invitation = invitation

    def heard(self, connection: int, message: Message, now: float) -> Sends:
        """A message has come. Raises KeyError, TypeError or ValueError if it is of none of our ranks."""
        if not self.retired:
            self._heard(connection, message, now)
            self._decide()
        return self._taken()

    def ended(self, connection: int) -> Sends:
        """The connection has ended."""
        peer = self._peers.pop(connection, None)
        if peer is not None and not self.retired:
            if self._visitors.get(peer.rank) is peer:
                self._dismiss(self._layout.client_of(peer.rank), f"its rank {peer.rank} is gone")
            if self._lines.get(peer.rank) is peer:
                del self._lines[peer.rank]
                if peer.rank not in self._done:
                    self._put_out(self._layout.client_of(peer.rank), f"its rank {peer.rank} is gone")
        return self._taken()

    def awake(self, now: float) -> Sends:
        """To be called before it hears what has come meanwhile, again and again."""
        if now - self._signed > self._silence_s:
            self._retire()  # this process was stopped, and the others have lost it
        elif now - self._signed >= min(ALIVE_S, self._silence_s / 20):
            self._signed = now
            for peer in self._lines.values():
                self._send(peer, "alive")
        return self._taken()

    def passed(self, now: float) -> Sends:
        """To be called after it has heard what had come, again and again."""
        if not self.retired:
            self._give_up_waiting(now)
            self._put_out_who_hangs()
        return self._taken()

    def _heard(self, connection: int, message: Message, now: float) -> None:
        kind, peer = message["kind"], self._peers.get(connection)
        if kind == "hello":
            last, lost = Decision.read(message["last"]), [int(client) for client in message["lost"]]
            self._hello(_Peer(connection, self._rank(message), int(last.number)), last, lost, now)
        elif kind == "join":
            self._join(_Peer(connection, self._rank(message), address=message["address"]))
        elif kind == "who":
            part = [] if self.invitation is None else self.clients
            self._sends.append((connection, {"kind": "part", "clients": part}))
        elif peer is not None and kind == "ready":
            peer.ready = True
        elif peer is None or self._lines.get(peer.rank) is not peer:  # a stranger's, or of one that is out
            return
        elif kind == "vote":
            if message["number"] == self.last.number + 1:  # an older one has been decided by those who knew all votes
                yes, _ = self._votes[peer.rank] = int(message["yes"]), str(message["news"])
                if not yes & YES:
                    self._interrupt()
        elif kind == "goodbye":
            self._done.add(peer.rank)
        elif kind == "leave":
            self._lose({peer.rank: str(message["why"])})
        elif kind == "stalled" and message["number"] == self.last.number + 1:
            self._hear_of_a_stall(now)

    def _hello(self, peer: _Peer, last: Decision, lost: Sequence[int], now: float) -> None:
        self._peers[peer.connection] = peer
        if last.number < self.last.number - 1:  # its client may have come back since, as new processes
            self._send(peer, "out", why="the others have gone on without it")
            return
        self._lines[peer.rank] = peer
        if last.number > self.last.number:
            self._settle(last)
        if begins := peer.rank == self._leader:
            self._at_work = True
            self._gathered = now + (GRACE_S if last.number else self._timeout_s)
            for client in lost:
                self._put_out(client, "it was lost with the coordinator before")
        if not self._at_work:
            self._send(peer, "alive")  # its leader has not lost the coordinator before
            return
        for other in list(self._lines.values()):
            if self._layout.client_of(other.rank) not in self.clients or other.known < self.last.number - 1:
                self._turn_away(other.rank, "the others have gone on without it")
                continue
            if other is peer or begins:
                self._send(other, "welcome")
            if other.known < self.last.number:
                self._tell(other)
            if self._will_not_count:
                self._send(other, "interrupt")

    def _join(self, peer: _Peer) -> None:
        client = self._layout.client_of(peer.rank)
        self._peers[peer.connection] = peer
        if not self._at_work or self.invitation is None:
            self._send(peer, "asleep")
            return
        if client in self.clients:
            self._send(peer, "out", why=f"client {client} is still in the job")
            return
        if peer.rank in self._visitors:
            self._dismiss(client, f"another process has asked to join as rank {peer.rank}")
        self._visitors[peer.rank] = peer
        ranks = self._layout.ranks_of(client)
        if all(rank in self._visitors for rank in ranks):
            self._visits += 1
            visit = f"{self.last.number}.{self._visits}"  # another coordinator's numbers are higher
            told = self.invitation | {"addresses": self._addresses(self.invitation)}
            for rank in ranks:
                self._visitors[rank].store = told["store"]
                self._send(self._visitors[rank], "invitation", visit=visit, clients=self.clients, **told)

    def _announced(self, yes: int) -> tuple[tuple[int, str, int], ...]:
        """Clients that come in with a decision, at most one: all its ranks are ready, and all others let it in, none of
        whom has been lost meanwhile: else they make up for that first."""
        for rank in self._visitors if yes & YES and yes & OPEN and not self._gone else ():
            client = self._layout.client_of(rank)
            ranks = self._layout.ranks_of(client)
            address = self._visitors[ranks[0]].address if ranks[0] in self._visitors else None
            if address and all(each in self._visitors and self._visitors[each].ready for each in ranks):
                assert self.invitation is not None, "its own leader has given it one before being open to anybody"
                if self._visitors[rank].store != self.invitation["store"]:
                    self._dismiss(client, "the job has moved to another store while it waited: join again")
                    return ()
                self._lines |= {each: self._visitors.pop(each) for each in ranks}
                for each in ranks:  # others may have come in while it waited
                    self._send(self._lines[each], "addresses", addresses=self._addresses(self.invitation))
                return ((client, *address),)
        return ()

    def _addresses(self, invitation: Message) -> list[Any]:
        """Of all coordinators, also of those that have come in and that the leader has not heard of."""
        joining = [client for client, _, _ in self.last.joining]
        return [each for each in invitation["addresses"] if each[0] not in joining] + [*self.last.joining]

    def _dismiss(self, client: int, why: str) -> None:
        for rank in self._layout.ranks_of(client):
            if visitor := self._visitors.pop(rank, None):
                self._send(visitor, "out", why=why)

    def _put_out(self, client: int, why: str) -> None:
        if client not in self.clients:
            return
        self._gone.add(client)
        for rank in self._layout.ranks_of(client):
            self._votes.pop(rank, None)
            self._done.discard(rank)
            self._turn_away(rank, why)
        self._interrupt()
        self._decide()

    def _turn_away(self, rank: int, why: str) -> None:
        if peer := self._lines.pop(rank, None):
            self._send(peer, "out", why=why)

    @property
    def _will_not_count(self) -> bool:
        """Whether it is known that the next decision will not be a yes."""
        voted_no = any(not yes & YES for yes, _ in self._votes.values())
        return bool(self._gone) or self._stalled is not None or voted_no

    def _interrupt(self) -> None:
        for peer in self._lines.values():
            self._send(peer, "interrupt")

    def _give_up_waiting(self, now: float) -> None:
        if self._gathered is None or now < self._gathered:
            return
        self._gathered = None
        for rank in self._ranks_of(self.clients):
            if rank not in self._lines and rank not in self._done:
                self._put_out(self._layout.client_of(rank), f"its rank {rank} has not come")

    def _hear_of_a_stall(self, now: float) -> None:
        if self._stalled is None or now - self._stalled[1] > _HANGING_S:
            self._stalled = now, now
            self._interrupt()
        self._stalled = self._stalled[0], now

    def _put_out_who_hangs(self) -> None:
        if self._stalled is None or self._stalled[1] - self._stalled[0] < _PATIENCE_S:
            return
        self._stalled = None
        missing = [rank for rank in self._voters() if rank not in self._votes]
        self._lose({rank: f"its rank {rank} has not moved on for cluster.timeout_s" for rank in missing})

    def _lose(self, reasons: Mapping[int, str]) -> None:
        """Put the clients of these ranks out, each for its reason."""
        if any(self._is_own(rank) for rank in reasons):
            self._retire()
            return
        for rank, why in reasons.items():
            self._put_out(self._layout.client_of(rank), why)

    def _retire(self) -> None:
        """The others go on with the next client's coordinator."""
        self.retired, self.invitation = True, None

    def _voters(self) -> list[int]:
        return [rank for rank in self._ranks_of(self.clients) if rank not in self._done]

    def _decide(self) -> None:
        ranks = self._voters()
        if not ranks or any(rank not in self._votes for rank in ranks):
            return
        yes = -1
        for rank in ranks:
            yes &= self._votes[rank][0]
        news = self._votes[ranks[0]][1]
        joining = self._announced(yes)
        self._settle(Decision(self.last.number + 1, yes, news, tuple(self.clients), joining))
        ranks += self._ranks_of([client for client, _, _ in joining])
        for rank in sorted(ranks, key=self._is_own):  # its own client last: with that one this process may end
            self._tell(self._lines[rank])

    def _settle(self, decision: Decision) -> None:
        """This is the last decision from now on, by the votes that have come here or at the coordinator before."""
        self.last = decision
        self._gone &= set(decision.clients)
        self._votes.clear()
        self._stalled = None

    def _tell(self, peer: _Peer) -> None:
        peer.known = self.last.number
        self._send(peer, "decision", **asdict(self.last))

    def _send(self, peer: _Peer, kind: str, **content: Any) -> None:
        self._sends.append((peer.connection, {"kind": kind, **content}))

    def _taken(self) -> Sends:
        sends, self._sends = self._sends, []
        return sends

    def _rank(self, message: Message) -> int:
        rank = int(message["rank"])
        if rank not in range(self._layout.leader_of(self._layout.clients)):
            raise ValueError(f"no such rank: {rank}")
        return rank

    def _is_own(self, rank: int) -> bool:
        return self._layout.client_of(rank) == self._layout.client_of(self._leader)

    def _ranks_of(self, clients: Sequence[int]) -> list[int]:
        """The clients' ranks, client by client."""
        return [rank for client in clients for rank in self._layout.ranks_of(client)]

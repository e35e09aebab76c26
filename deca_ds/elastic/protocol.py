"""The membership protocol: all ranks agree on what counts and on the members, while clients die, hang and rejoin.

This module implements the coordinator; voter.py implements the rank. Both are pure state machines: a message, the end
of a connection or the passing of time changes their state, and they return the messages to send. Time is a parameter,
in seconds of any monotonic clock. Sockets, threads and clocks are in quorum_server.py, quorum_client.py and wire.py, so
tests can drive whole jobs through faults within milliseconds.

The leader of each client runs a coordinator. One coordinator is active at a time; at the start it is the first
client's. Every rank keeps a connection to the active one. Messages are JSON objects of a few hundred bytes:

    rank to coordinator    hello (its rank, the last decision that it knows, coordinators that it has lost), vote,
                           goodbye, leave (its client leaves the job), stalled (it has voted, and nobody in the job has
                           made progress for cluster.timeout_s)
    coordinator to rank    welcome, interrupt (the next decision will not be a yes), decision, out (the rank's client
                           has been dropped), alive
    a rejoining client     sends join and ready; receives invitation, asleep (this coordinator is not active),
                           addresses (of all coordinators)
    another network part   sends who; receives part (the members, none if this coordinator is not active)

1. All ranks of all members vote on the same number. The decision is the bitwise AND of their answers.
2. If a connection ends without a goodbye, the coordinator drops its client. The next decision names the remaining
   clients. A no vote or a lost connection interrupts all ranks at once, so that no rank waits for messages that will
   not come.
3. When the ranks lose the coordinator itself, each of them says hello to the leader of the next client. That client's
   coordinator becomes active as soon as its own rank has said hello, because that rank has then lost the old one too.
   After a while the new coordinator drops the clients that have not said hello. It gives the last decision to a rank
   that missed it. Ranks are at most one decision apart, because a decision needs the votes of all ranks that know the
   one before; a rank that is further behind was dropped in the meantime.
4. A dropped client may rejoin, as new processes. When all its ranks are ready, the next decision to which all ranks
   have voted yes and OPEN announces it. The client votes from the following agreement on, and is the last in the order
   in which clients take over as coordinator.
5. A hanging client is dropped like a dead one: when a rank reports that it is stalled, the coordinator interrupts all
   ranks, and drops the clients whose votes are still missing a few seconds later, unless they have yet to come to it
   (3). A coordinator that gives no sign of life for cluster.timeout_s counts as lost. One that finds its own client
   hanging, or whose process was stopped for that long, closes all connections, and so counts as lost, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from deca_ds.elastic.decision import OPEN, YES, Decision
from deca_ds.launch import ClientLayout

GRACE_S = 20.0  # for the other ranks to notice that the old coordinator is lost; with a silent host this takes 11 s
ALIVE_S = 5.0  # a coordinator gives signs of life at least this often
_PATIENCE_S = 5.0  # for the ranks that do not hang to learn of the stall, and to vote
_OVER_S = 10.0  # after so long without `stalled` a stall is over; ranks repeat it every second, busy ones more rarely

_WITHOUT_IT = "the others have continued without it"

Message = dict[str, Any]
Sends = list[tuple[int, Message]]  # connection and message


@dataclass
class _Peer:
    """The rank at the other end of a connection. known: number of the last decision sent to it.

    For a rank of a rejoining client, ready: whether it only waits to be let in; address: of its coordinator, if it is
    the leader; store: address of the job's store when it was invited.
    """

    connection: int
    rank: int
    known: int = -1
    ready: bool = False
    address: tuple[str, int] | None = None
    store: tuple[str, int] | None = None


class Coordinator:
    """The coordinator of client `client`. clients: the members at the start of the job. timeout_s: time for all their
    ranks to connect at the start. silence_s: time without a sign of life after which a coordinator counts as lost. now:
    the time, as in the methods.

    The caller identifies connections by numbers of its choice. last: the last decision that the coordinator knows.
    invitation: what a rejoining client needs to know. retired: whether the caller must close all connections, for good.
    """

    def __init__(
        self, layout: ClientLayout, client: int, clients: Sequence[int], timeout_s: float, silence_s: float, now: float
    ):
        self._layout, self._leader = layout, layout.leader_of(client)
        self._timeout_s, self._silence_s = timeout_s, silence_s
        self._over_s = max(3.0, min(_OVER_S, silence_s / 2))  # the next stall does not begin before silence_s
        self.last = Decision(0, 0, "", tuple(clients))
        self.invitation: Message | None = None
        self.retired = False
        self._active = False
        self._gone: set[int] = set()  # clients dropped since the last decision
        self._peers: dict[int, _Peer] = {}  # by connection
        self._lines: dict[int, _Peer] = {}  # members, by rank
        self._rejoining: dict[int, _Peer] = {}  # ranks of clients that have asked to rejoin, by rank
        self._invited = 0  # how often it has invited a client
        self._done: set[int] = set()  # ranks that have said goodbye
        self._votes: dict[int, tuple[int, str]] = {}
        self._gathered: float | None = None  # time after which ranks that have never connected are dropped
        self._stalled: tuple[float, float] | None = None  # first and last time of the current series of `stalled`
        self._signed = now  # when it gave the last sign of life
        self._sends: Sends = []

    @property
    def clients(self) -> list[int]:
        """The members, in the order in which they become coordinator; empty while this one is not active."""
        return [client for client in self.last.everybody if client not in self._gone] if self._active else []

    def invite(self, invitation: Message) -> None:
        """Send this invitation to rejoining clients from now on."""
        self.invitation = invitation

    def heard(self, connection: int, message: Message, now: float) -> Sends:
        """Handle a message. Raises KeyError, TypeError or ValueError if the message is not one of this protocol."""
        if not self.retired:
            self._heard(connection, message, now)
            self._decide()
        return self._taken()

    def ended(self, connection: int) -> Sends:
        """Handle the end of a connection."""
        peer = self._peers.pop(connection, None)
        if peer is not None and not self.retired:
            if self._rejoining.get(peer.rank) is peer:
                self._dismiss(self._layout.client_of(peer.rank), f"its rank {peer.rank} is gone")
            if self._lines.get(peer.rank) is peer:
                del self._lines[peer.rank]
                if peer.rank not in self._done:
                    self._drop(self._layout.client_of(peer.rank), f"its rank {peer.rank} is gone")
        return self._taken()

    def awake(self, now: float) -> Sends:
        """Send signs of life. The caller must call this regularly, each time before it passes on messages."""
        if now - self._signed > self._silence_s:
            self._retire()  # this process was stopped, and the others have lost it
        elif now - self._signed >= min(ALIVE_S, self._silence_s / 20):
            self._signed = now
            for peer in self._lines.values():
                self._send(peer, "alive")
        return self._taken()

    def passed(self, now: float) -> Sends:
        """Drop clients whose time is over. The caller must call this regularly, each time after it has passed on
        messages."""
        if not self.retired:
            self._drop_missing(now)
            self._drop_hanging()
        return self._taken()

    def _heard(self, connection: int, message: Message, now: float) -> None:
        kind, peer = message["kind"], self._peers.get(connection)
        if kind == "hello":
            last, lost = Decision.read(message["last"]), [int(client) for client in message["lost"]]
            self._hello(_Peer(connection, self._rank(message), int(last.number)), last, lost, now)
        elif kind == "join":
            self._join(_Peer(connection, self._rank(message), address=_address(message["address"])))
        elif kind == "who":
            part = [] if self.invitation is None else self.clients
            self._sends.append((connection, {"kind": "part", "clients": part}))
        elif peer is not None and kind == "ready":
            peer.ready = True
        elif peer is None or self._lines.get(peer.rank) is not peer:  # from a stranger or a dropped client
            return
        elif kind == "vote":
            if message["number"] == self.last.number + 1:  # a coordinator that knew all votes has decided an older one
                yes, _ = self._votes[peer.rank] = int(message["yes"]), str(message["announcement"])
                if not yes & YES:
                    self._interrupt()
        elif kind == "goodbye":
            self._done.add(peer.rank)
        elif kind == "leave":
            self._lose({peer.rank: str(message["why"])})
        elif kind == "stalled" and message["number"] == self.last.number + 1:
            self._note_stall(now)

    def _hello(self, peer: _Peer, last: Decision, lost: Sequence[int], now: float) -> None:
        self._peers[peer.connection] = peer
        if last.number < self.last.number - 1:  # its client may have rejoined since, as new processes
            self._send(peer, "out", why=_WITHOUT_IT)
            return
        self._lines[peer.rank] = peer
        self._stalled = None  # this rank needs time to learn of the stall, too
        if last.number > self.last.number:
            self._settle(last)
        if begins := peer.rank == self._leader:
            self._active = True
            self._gathered = now + (GRACE_S if last.number else self._timeout_s)
            for client in lost:
                self._drop(client, "it was lost with the coordinator before")
        if not self._active:
            self._send(peer, "alive")  # this client's leader has not lost the previous coordinator
            return
        for other in list(self._lines.values()):
            if self._layout.client_of(other.rank) not in self.clients or other.known < self.last.number - 1:
                self._send_out(other.rank, _WITHOUT_IT)
                continue
            if other is peer or begins:
                self._send(other, "welcome")
            if other.known < self.last.number:
                self._send_decision(other)
            if self._will_not_count:
                self._send(other, "interrupt")

    def _join(self, peer: _Peer) -> None:
        client = self._layout.client_of(peer.rank)
        self._peers[peer.connection] = peer
        if not self._active or self.invitation is None:
            self._send(peer, "asleep")
            return
        if client in self.clients:
            self._send(peer, "out", why=f"client {client} is still in the job")
            return
        if peer.rank in self._rejoining:
            self._dismiss(client, f"another process has asked to join as rank {peer.rank}")
        self._rejoining[peer.rank] = peer
        ranks = self._layout.ranks_of(client)
        if all(rank in self._rejoining for rank in ranks):
            self._invited += 1
            rejoin_id = f"{self.last.number}.{self._invited}"  # the next coordinator's decisions have higher numbers
            content = self.invitation | {"addresses": self._addresses(self.invitation)}
            for rank in ranks:
                self._rejoining[rank].store = content["store"]
                self._send(self._rejoining[rank], "invitation", rejoin_id=rejoin_id, clients=self.clients, **content)

    def _announced(self, yes: int) -> tuple[tuple[int, str, int], ...]:
        """Return the client that the next decision lets in, if any. All its ranks must be ready, and all members must
        have voted OPEN. If a member was dropped meanwhile, the others first repeat the work without that one."""
        for rank in self._rejoining if yes & YES and yes & OPEN and not self._gone else ():
            client = self._layout.client_of(rank)
            ranks = self._layout.ranks_of(client)
            address = self._rejoining[ranks[0]].address if ranks[0] in self._rejoining else None
            if address and all(each in self._rejoining and self._rejoining[each].ready for each in ranks):
                assert self.invitation is not None, "its own leader has given it one before being open to anybody"
                if self._rejoining[rank].store != self.invitation["store"]:
                    self._dismiss(client, "the job has moved to another store while it waited: join again")
                    return ()
                self._lines |= {each: self._rejoining.pop(each) for each in ranks}
                for each in ranks:  # other clients may have rejoined while it waited
                    self._send(self._lines[each], "addresses", addresses=self._addresses(self.invitation))
                return ((client, *address),)
        return ()

    def _addresses(self, invitation: Message) -> list[Any]:
        """Return the addresses of all coordinators, those of clients included that have rejoined since the leader wrote
        the invitation."""
        joining = [client for client, _, _ in self.last.joining]
        return [each for each in invitation["addresses"] if each[0] not in joining] + [*self.last.joining]

    def _dismiss(self, client: int, why: str) -> None:
        for rank in self._layout.ranks_of(client):
            if peer := self._rejoining.pop(rank, None):
                self._send(peer, "out", why=why)

    def _drop(self, client: int, why: str) -> None:
        if client not in self.clients:
            return
        self._gone.add(client)
        for rank in self._layout.ranks_of(client):
            self._votes.pop(rank, None)
            self._done.discard(rank)
            self._send_out(rank, why)
        self._interrupt()
        self._decide()

    def _send_out(self, rank: int, why: str) -> None:
        if peer := self._lines.pop(rank, None):
            self._send(peer, "out", why=why)

    @property
    def _will_not_count(self) -> bool:
        """Whether the next decision is already known not to be a yes."""
        voted_no = any(not yes & YES for yes, _ in self._votes.values())
        return bool(self._gone) or self._stalled is not None or voted_no

    def _interrupt(self) -> None:
        for peer in self._lines.values():
            self._send(peer, "interrupt")

    def _drop_missing(self, now: float) -> None:
        if self._gathered is None or now < self._gathered:
            return
        self._gathered = None
        for rank in self._ranks_of(self.clients):
            if rank not in self._lines and rank not in self._done:
                self._drop(self._layout.client_of(rank), f"its rank {rank} has not come")

    def _note_stall(self, now: float) -> None:
        if self._stalled is None or now - self._stalled[1] > self._over_s:
            self._stalled = now, now
            self._interrupt()
        self._stalled = self._stalled[0], now

    def _drop_hanging(self) -> None:
        if self._stalled is None or self._stalled[1] - self._stalled[0] < _PATIENCE_S:
            return
        self._stalled = None
        missing = [rank for rank in self._voters() if rank not in self._votes and rank in self._lines]
        self._lose({rank: f"its rank {rank} has made no progress for cluster.timeout_s" for rank in missing})

    def _lose(self, reasons: Mapping[int, str]) -> None:
        """Drop the clients of these ranks, each for its reason; if one is the coordinator's own, retire instead."""
        if any(self._is_own(rank) for rank in reasons):
            self._retire()
            return
        for rank, why in reasons.items():
            self._drop(self._layout.client_of(rank), why)

    def _retire(self) -> None:
        """Stop coordinating; the other clients continue with the next client's coordinator."""
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
        announcement = self._votes[ranks[0]][1]
        joining = self._announced(yes)
        self._settle(Decision(self.last.number + 1, yes, announcement, tuple(self.clients), joining))
        ranks += self._ranks_of([client for client, _, _ in joining])
        for rank in sorted(ranks, key=self._is_own):  # its own client last: with that one this process may end
            self._send_decision(self._lines[rank])

    def _settle(self, decision: Decision) -> None:
        """Adopt a decision as the last one, whether this coordinator or the previous one counted its votes."""
        self.last = decision
        self._gone &= set(decision.clients)
        self._votes.clear()
        self._stalled = None

    def _send_decision(self, peer: _Peer) -> None:
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
        """Return the clients' ranks, client by client."""
        return [rank for client in clients for rank in self._layout.ranks_of(client)]


def _address(told: Any) -> tuple[str, int] | None:
    """Read the address of a coordinator, which only leaders have. Raises TypeError or ValueError if it is none."""
    if told is None:
        return None
    host, port = told
    return str(host), int(port)

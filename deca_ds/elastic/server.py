"""Agreements without MPI: every rank votes at a coordinator, and all agree on who is left when a client dies.

Each client's leader runs a `QuorumServer`, a thread. One of them at a time is at work, at the start that of client 0.
Every rank keeps a connection to it (client.py). Messages are lines of JSON of a few hundred bytes:

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
   decision takes the votes of all who know the one before.
4. A client that has gone may come back, as new processes. When all its ranks are ready, the next decision to which all
   have voted yes and OPEN announces it. From the agreement after that one on it votes like the others. It stands at the
   end of the line of those who become coordinator, so that it takes nobody's place.
5. A client that hangs is put out like one that has gone: when somebody is stalled all others are interrupted, and whose
   votes are still missing then is out. A coordinator that gives no sign of life for cluster.timeout_s is lost. One that
   finds its own client hanging, or that was stopped itself for so long, closes all connections: then it is lost, too.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from deca_ds.elastic.agreement import OPEN, YES, Decision, JsonConnection
from deca_ds.launch.launcher import ClientLayout

GRACE_S = 20.0  # for the others to notice that the old coordinator is lost; a silent host takes them about 11 s
_ALIVE_S = 5.0  # at most, between two signs of life of a coordinator that is at work
_PATIENCE_S = 5.0  # for those who do not hang to hear that somebody does, and to vote
_HANGING_S = 3.0  # a rank that hears of no progress says so every second


class QuorumServer:
    """Of client `client`. host: address to listen at. timeout_s: for all ranks to come at the start of the job, which
    is that of `clients`. silence_s: after so long without a sign of life a coordinator is lost.

    address: where ranks reach it. invitation: what a returning client has to know, once `invite` has been called.
    """

    def __init__(
        self, layout: ClientLayout, client: int, host: str, timeout_s: float, clients: Sequence[int], silence_s: float
    ):
        self._layout, self._leader = layout, layout.leader_of(client)
        self._timeout_s, self._silence_s = timeout_s, silence_s
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._server = socket.create_server((host, 0), family=family, backlog=1024)
        self.address: tuple[str, int] = self._server.getsockname()[:2]
        self._lines: dict[int, JsonConnection] = {}  # by rank
        self._last = Decision(0, 0, "", tuple(clients))
        self.invitation: dict[str, Any] | None = None
        self._visits = 0
        self._visitors: dict[int, JsonConnection] = {}  # ranks of clients that want to come back
        self._clients: list[int] = []  # who is in, once at work; itself first
        self._done: set[int] = set()  # ranks that have said goodbye
        self._votes: dict[int, tuple[int, str]] = {}
        # monotonic times:
        self._gathered: float | None = None  # after which nobody is waited for who has never come
        self._stalled: tuple[float, float] | None = None  # when somebody was so first, of late, and last
        self._signed = time.monotonic()  # of the last sign of life
        self._retired = False
        threading.Thread(target=self._serve, daemon=True).start()

    def invite(self, invitation: dict[str, Any]) -> None:
        """Tell this to clients that come back, from now on. Called by the leader, again whenever it changes."""
        self.invitation = invitation

    def _serve(self) -> None:
        with selectors.DefaultSelector() as ready:
            ready.register(self._server, selectors.EVENT_READ, None)
            while not self._retired:
                heard = ready.select(timeout=min(0.5, self._silence_s / 20))
                self._sign()
                for key, _ in heard:
                    if self._retired:
                        break
                    if key.data is None:
                        line = JsonConnection(self._server.accept()[0])
                        ready.register(line.connection, selectors.EVENT_READ, line)
                    elif (messages := key.data.receive()) is None:
                        ready.unregister(key.data.connection)
                        self._ended(key.data)
                    else:
                        self._hear(key.data, messages)
                self._give_up_waiting()
                self._put_out_who_hangs()

    def _hear(self, line: JsonConnection, messages: list[dict[str, Any]]) -> None:
        try:
            for message in messages:
                self._heard(line, message)
        except (KeyError, TypeError, ValueError):  # not one of our ranks
            with contextlib.suppress(OSError):
                line.connection.shutdown(socket.SHUT_RDWR)

    def _heard(self, line: JsonConnection, message: dict[str, Any]) -> None:
        if message["kind"] == "hello":
            self._hello(line, message)
        elif message["kind"] == "join":
            self._join(line, message["rank"], message["address"])
        elif message["kind"] == "ready":
            line.ready = True
        elif message["kind"] == "who":
            line.send("part", clients=self._clients if self.invitation is not None else [])
        elif line.rank is None or self._lines.get(line.rank) is not line:  # a stranger's, or of one that is out
            return
        elif message["kind"] == "vote":
            if message["number"] == self._last.number + 1:  # an older one has been decided by those who knew all votes
                self._votes[line.rank] = message["yes"], message["news"]
                if not message["yes"] & YES:
                    self._interrupt()
        elif message["kind"] == "goodbye":
            self._done.add(line.rank)
        elif message["kind"] == "leave":
            self._lose({line.rank: str(message["why"])})
        elif message["kind"] == "stalled" and message["number"] == self._last.number + 1:
            self._hear_of_a_stall()
        self._decide()

    def _hello(self, line: JsonConnection, message: dict[str, Any]) -> None:
        last = Decision.read(message["last"])
        self._check(message["rank"])
        line.rank, line.known = message["rank"], last.number
        self._lines[message["rank"]] = line
        if last.number > self._last.number:
            self._last = last
        if line.rank == self._leader:
            self._clients = list(self._last.everybody)
            self._gathered = time.monotonic() + (GRACE_S if last.number else self._timeout_s)
            for client in message["lost"]:
                self._put_out(client, "it was lost with the coordinator before")
        if not self._clients:
            line.send("alive")  # once: its leader has not lost the coordinator before
            return
        for rank, other in self._lines.items():
            if self._layout.client_of(rank) not in self._clients:
                other.send("out", why="the others have gone on without it")
                continue
            if other is line or line.rank == self._leader:
                other.send("welcome")
            if other.known < self._last.number:
                self._tell(other)

    def _join(self, line: JsonConnection, rank: int, address: tuple[str, int] | None) -> None:
        self._check(rank)
        client = self._layout.client_of(rank)
        if not self._clients or self.invitation is None:
            line.send("asleep")
            return
        if client in self._clients:
            line.send("out", why=f"client {client} is still in the job")
            return
        line.rank, line.address = rank, address
        self._visitors[rank] = line
        ranks = self._ranks_of([client])
        if all(each in self._visitors for each in ranks):
            self._visits += 1
            visit = f"{self._last.number}.{self._visits}"  # another coordinator's numbers are higher
            for each in ranks:
                self._visitors[each].store = self.invitation["store"]
                self._visitors[each].send("invitation", visit=visit, clients=self._clients, **self.invitation)

    def _announced(self, yes: int) -> tuple[tuple[int, str, int], ...]:
        """Clients that come in with a decision, at most one: all its ranks are ready, and all others let it in, none of
        whom has been lost meanwhile: else they make up for that first."""
        nobody_lost = self._clients == list(self._last.everybody)
        for rank in self._visitors if yes & YES and yes & OPEN and nobody_lost else ():
            client = self._layout.client_of(rank)
            ranks = self._ranks_of([client])
            address = self._visitors[ranks[0]].address if ranks[0] in self._visitors else None
            if address and all(each in self._visitors and self._visitors[each].ready for each in ranks):
                assert self.invitation is not None, "its own leader has given it one before being open to anybody"
                if self._visitors[rank].store != self.invitation["store"]:
                    self._dismiss(client, "the job has moved to another store while it waited: join again")
                    return ()
                self._lines |= {each: self._visitors.pop(each) for each in ranks}
                for each in ranks:  # others may have come in while it waited
                    self._lines[each].send("addresses", addresses=self.invitation["addresses"])
                return ((client, *address),)
        return ()

    def _dismiss(self, client: int, why: str) -> None:
        for rank in self._ranks_of([client]):
            if visitor := self._visitors.pop(rank, None):
                visitor.send("out", why=why)

    def _check(self, rank: int) -> None:
        if rank not in range(self._layout.leader_of(self._layout.clients)):
            raise ValueError(f"no such rank: {rank}")

    def _ended(self, line: JsonConnection) -> None:
        line.connection.close()
        if line.rank is not None and self._visitors.get(line.rank) is line:
            self._dismiss(self._layout.client_of(line.rank), f"its rank {line.rank} is gone")
        if line.rank is not None and self._lines.get(line.rank) is line:
            del self._lines[line.rank]
            if line.rank not in self._done and self._clients:
                self._put_out(self._layout.client_of(line.rank), f"its rank {line.rank} is gone")

    def _put_out(self, client: int, why: str) -> None:
        if client not in self._clients:
            return
        self._clients.remove(client)
        for rank in self._ranks_of([client]):
            self._votes.pop(rank, None)
            if line := self._lines.pop(rank, None):
                line.send("out", why=why)
        self._interrupt()
        self._decide()

    def _interrupt(self) -> None:
        for line in self._lines.values():
            line.send("interrupt")

    def _give_up_waiting(self) -> None:
        if self._gathered is None or time.monotonic() < self._gathered:
            return
        self._gathered = None
        for rank in self._ranks_of(self._clients):
            if rank not in self._lines and rank not in self._done:
                self._put_out(self._layout.client_of(rank), f"its rank {rank} has not come")

    def _sign(self) -> None:
        now = time.monotonic()
        if now - self._signed > self._silence_s:
            self._retire()  # this process was stopped, and the others have lost it
        elif now - self._signed >= min(_ALIVE_S, self._silence_s / 20):
            self._signed = now
            for line in self._lines.values() if self._clients else ():
                line.send("alive")

    def _hear_of_a_stall(self) -> None:
        now = time.monotonic()
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
        self._retired, self.invitation = True, None
        self._server.close()
        for line in [*self._lines.values(), *self._visitors.values()]:
            with contextlib.suppress(OSError):
                line.connection.shutdown(socket.SHUT_RDWR)

    def _voters(self) -> list[int]:
        return [rank for rank in self._ranks_of(self._clients) if rank not in self._done]

    def _decide(self) -> None:
        ranks = self._voters()
        if not ranks or any(rank not in self._votes for rank in ranks):
            return
        self._stalled = None
        yes = -1
        for rank in ranks:
            yes &= self._votes[rank][0]
        news = self._votes[ranks[0]][1]
        joining = self._announced(yes)
        self._last = Decision(self._last.number + 1, yes, news, tuple(self._clients), joining)
        newcomers = [client for client, _, _ in joining]
        self._clients += newcomers
        self._votes.clear()
        ranks += self._ranks_of(newcomers)
        for rank in sorted(ranks, key=self._is_own):  # its own client last: with that one this process may end
            self._tell(self._lines[rank])

    def _tell(self, line: JsonConnection) -> None:
        line.known = self._last.number
        line.send("decision", **asdict(self._last))  # one that is not taken is noticed at the connection's end

    def _is_own(self, rank: int) -> bool:
        return self._layout.client_of(rank) == self._layout.client_of(self._leader)

    def _ranks_of(self, clients: Sequence[int]) -> list[int]:
        """The clients' ranks, client by client."""
        return [rank for client in clients for rank in self._layout.ranks_of(client)]

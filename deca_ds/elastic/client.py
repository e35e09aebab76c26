"""One rank's part in the agreements that server.py explains."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, NoReturn

from deca_ds.elastic.agreement import Decision, JsonConnection, is_in_reach
from deca_ds.elastic.rejoin import Addresses, Visit
from deca_ds.elastic.server import GRACE_S, QuorumServer
from deca_ds.errors import CutOffError, GossipError, UserError
from deca_ds.launch.launcher import ClientLayout, Launch
from deca_ds.launch.store import JobStore, own_address

_CONNECT_S = 5.0


class QuorumClient:
    """A thread keeps the connection to whoever is the coordinator, also while this rank is busy with something else.

    addresses: of every client's coordinator, as it is now; at the start, of those that are there. timeout_s: for all
    ranks to come to an agreement. silence_s: see QuorumServer. own: this client's coordinator, on its leader. visit: of
    a client that comes back; it does not vote before `enter`. cut_off: set when this client is out, or out of the
    others' reach.
    interrupted: set as soon as a client has gone or a rank has voted no, until the next decision.
    """

    def __init__(
        self,
        rank: int,
        layout: ClientLayout,
        addresses: Mapping[int, tuple[str, int]],
        timeout_s: float,
        silence_s: float,
        own: QuorumServer | None = None,
        visit: Visit | None = None,
    ):
        self.own = own
        self.interrupted, self.cut_off = threading.Event(), threading.Event()
        self._rank, self.addresses, self._timeout_s, self._silence_s = rank, dict(addresses), timeout_s, silence_s
        self.client = layout.client_of(rank)
        self._last = Decision(0, 0, "", tuple(addresses))
        self._visit = visit
        self._lost: list[int] = []  # clients whose coordinators are out of reach
        self._line: JsonConnection | None = None
        self._ballot: dict[str, Any] | None = None  # until it is decided
        self._sending = threading.Lock()
        self._inbox: queue.Queue[Decision | UserError] = queue.Queue()
        threading.Thread(target=self._follow, daemon=True).start()

    @property
    def clients(self) -> tuple[int, ...]:
        """Who is in, by the last decision, in the order in which they become coordinator."""
        return self._last.everybody

    def enter(self) -> Decision:
        """For a client that comes back: wait until an agreement of the others lets it in, and return that one.

        Raises CutOffError if the coordinator is lost before.
        """
        assert self._visit is not None
        self._visit.line.send("ready")
        return self._wait(threading.TIMEOUT_MAX)

    def vote(self, yes: int, news: str = "") -> Decision:
        """Give answers, a bit each, and news, a short text; returns when all have.

        Raises CutOffError if this client is out or cut off, GossipError if not all ranks come within the time limit.
        """
        with self._sending:
            self._ballot = {"number": self._last.number + 1, "yes": yes, "news": news}
            if self._line is not None:
                self._line.send("vote", **self._ballot)  # if it does not arrive the connection ends
        return self._wait(self._timeout_s)

    def leave(self, why: str) -> NoReturn:
        """Put this client out, so that the others go on. Raises CutOffError."""
        with self._sending:
            if self._line is not None:
                self._line.send("leave", why=why)
        raise CutOffError(f"this client leaves the job: {why}", where=f"rank {self._rank}", fix="look at the network")

    def out_of_reach(self) -> list[int]:
        """Other clients that are in, to whose coordinators there is no connection from here."""
        others = [client for client in self.clients if client != self.client]
        with ThreadPoolExecutor(len(others)) as pool:
            reached = list(pool.map(is_in_reach, (self.addresses[client] for client in others)))
        return [client for client, reaches in zip(others, reached, strict=True) if not reaches]

    def stalled(self) -> None:
        """From another thread, again and again while nobody in the job moves on: who hangs has to go. First those who
        wait for messages stop that, and vote."""
        with self._sending:
            if self._ballot is None:
                self.interrupted.set()
            elif self._line is not None:
                self._line.send("stalled", number=self._ballot["number"])

    def _wait(self, timeout_s: float) -> Decision:
        try:
            decided = self._inbox.get(timeout=timeout_s)
        except queue.Empty:
            raise GossipError(
                f"no agreement within {timeout_s:g} s: not all ranks have come to it",
                where=f"rank {self._rank}",
                fix="look for a rank that hangs; if it is only slow, raise cluster.timeout_s",
            ) from None
        if isinstance(decided, UserError):
            raise decided
        return decided

    def close(self) -> None:
        """This rank is through."""
        with self._sending:
            if self._line is not None:
                self._line.send("goodbye")

    def _follow(self) -> None:
        """In the thread: go from coordinator to coordinator. `interrupted` follows the order of the messages."""
        try:
            if self._visit is not None:
                self._line = self._visit.line
                self._read(self._line)
                self.interrupted.set()
                self._lost.append(self._visit.coordinator)
                if self._last.number == 0:
                    raise CutOffError("the coordinator is lost before this client came in", fix="start it again")
            while left := [client for client in self.clients if client not in self._lost]:
                self._listen(left[0])
                self.interrupted.set()
                self._lost.append(left[0])
            raise CutOffError(
                "no other client is in reach",
                where=f"rank {self._rank}",
                fix="look at the network, and at whether this process was stopped for long",
            )
        except UserError as error:
            with self._sending:
                self._line = None  # a goodbye would say that it is through
            self.cut_off.set()
            self.interrupted.set()
            self._inbox.put(error)

    def _listen(self, client: int) -> None:
        """Take part in the agreements of `client`'s coordinator; returns when it is lost."""
        try:
            connection = socket.create_connection(self.addresses[client], _CONNECT_S)
        except OSError:
            return
        late_s = 2 * GRACE_S if self._last.number or self._lost else self._timeout_s
        connection.settimeout(late_s)
        line = JsonConnection(connection)
        line.send("hello", rank=self._rank, last=asdict(self._last), lost=self._lost)
        since = time.monotonic()
        signs = self._read(line)
        if line is not self._line and signs and time.monotonic() - since >= late_s:
            raise CutOffError(
                f"client {client} has not lost the coordinator that this rank has lost: it is cut off",
                where=f"rank {self._rank}",
                fix="look at the network",
            )

    def _read(self, line: JsonConnection) -> int:
        """Until the connection ends, or nothing comes any more; how many messages there have been."""
        signs = 0
        while (messages := line.receive()) is not None:
            signs += len(messages)
            for message in messages:
                if message["kind"] in ("welcome", "decision"):  # the coordinator is at work, and gives signs of life
                    line.connection.settimeout(self._silence_s)
                if message["kind"] == "welcome":
                    self._vote_again(line)
                elif message["kind"] == "interrupt":
                    self.interrupted.set()
                elif message["kind"] == "out":
                    raise CutOffError(f"this client is out of the job: {message['why']}", where=f"rank {self._rank}")
                elif message["kind"] == "addresses":
                    self.addresses |= {client: (host, port) for client, host, port in message["addresses"]}
                elif message["kind"] == "decision":
                    self._decided(Decision.read(message))
        return signs

    def _vote_again(self, line: JsonConnection) -> None:
        with self._sending:
            self._line = line
            if self._ballot is not None:
                line.send("vote", **self._ballot)

    def _decided(self, decision: Decision) -> None:
        with self._sending:
            if decision.number <= self._last.number:
                return
            self._last, self._ballot = decision, None
            for client, host, port in decision.joining:
                self.addresses[client] = host, port
                self._lost = [lost for lost in self._lost if lost != client]
        self.interrupted.clear()
        self._inbox.put(decision)


def open_votes(
    launch: Launch, layout: ClientLayout, store: JobStore, timeout_s: float, silence_s: float
) -> QuorumClient:
    """Start this client's coordinator, if this rank is its leader, and join the one at work. All ranks call this."""
    client, coordinator = layout.client_of(launch.rank), None
    clients = launch.clients(layout)
    if launch.rank == layout.leader_of(client):
        assert store.address is not None, "a single process has nobody to vote with"
        coordinator = QuorumServer(layout, client, own_address(store.address), timeout_s, clients, silence_s)
    told = store.gather(launch, "coordinators", coordinator and coordinator.address)
    addresses: Addresses = {c: tuple(told[layout.leader_of(c)]) for c in clients}
    return QuorumClient(launch.rank, layout, addresses, timeout_s, silence_s, coordinator)

"""A rank's votes, and a thread with its connection to the active coordinator (protocol.py)."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

from deca_ds.elastic.decision import Decision
from deca_ds.elastic.protocol import Message
from deca_ds.elastic.quorum_server import QuorumServer
from deca_ds.elastic.rejoin import Rejoin
from deca_ds.elastic.voter import Addresses, Effects, Voter
from deca_ds.elastic.wire import CONNECT_S, JsonConnection, is_in_reach
from deca_ds.errors import CutOffError, DisconnectedError, UserError
from deca_ds.launch import ClientLayout, Launch
from deca_ds.launch.store import JobStore, own_address


class QuorumClient:
    """This rank's votes. A thread keeps the connection to the active coordinator, also while the rank is busy.

    addresses: of every client's coordinator; at the start, of those that are there. timeout_s: for all ranks to come to
    an agreement. silence_s: see Coordinator. own: this client's coordinator, on its leader. rejoin: of a rejoining
    client, which does not vote before it is let in. cut_off: set when this client is out, or out of the others' reach.
    interrupted: set as soon as a client is dropped or a rank has voted no, until the next decision.
    """

    def __init__(
        self,
        rank: int,
        layout: ClientLayout,
        addresses: Mapping[int, tuple[str, int]],
        timeout_s: float,
        silence_s: float,
        own: QuorumServer | None = None,
        rejoin: Rejoin | None = None,
    ):
        self.own = own
        self.interrupted, self.cut_off = threading.Event(), threading.Event()
        self.client = layout.client_of(rank)
        self._rank, self._timeout_s = rank, timeout_s
        self._voter = Voter(rank, addresses, timeout_s, silence_s, None if rejoin is None else rejoin.coordinator)
        self._line = None if rejoin is None else rejoin.line
        self._lock = threading.Lock()  # guards the voter, and the sending of its messages
        self._inbox: queue.Queue[Decision | UserError] = queue.Queue()
        threading.Thread(target=self._follow, daemon=True).start()

    @property
    def clients(self) -> tuple[int, ...]:
        """The members by the last decision, in the order in which they become coordinator."""
        return self._voter.last.everybody

    @property
    def addresses(self) -> Addresses:
        """The current address of every client's coordinator."""
        return self._voter.addresses

    def wait_for_admission(self) -> Decision:
        """On a rejoining client, wait until an agreement of the others lets it in, and return that decision.

        Raises CutOffError if the coordinator is lost before.
        """
        with self._lock:
            self._do(self._voter.ready())
        return self._wait(threading.TIMEOUT_MAX)

    def vote(self, yes: int, announcement: str = "") -> Decision:
        """Vote with answers, a bit each; returns the decision once all ranks have voted. announcement: a short text,
        which the decision has if this is the first client's leader.

        Raises CutOffError if this client is out or cut off, DisconnectedError if not all ranks vote within the time
        limit.
        """
        with self._lock:
            self._do(self._voter.vote(yes, announcement))
        return self._wait(self._timeout_s)

    def leave(self, why: str) -> NoReturn:
        """Take this client out of the job, so that the others continue. Raises CutOffError."""
        with self._lock:
            self._do(self._voter.leave(why))
        raise CutOffError(f"this client leaves the job: {why}", where=f"rank {self._rank}", fix="look at the network")

    def out_of_reach(self) -> list[int]:
        """Return the other members to whose coordinators this rank cannot connect."""
        others = [client for client in self.clients if client != self.client]
        with ThreadPoolExecutor(len(others)) as pool:
            reached = list(pool.map(is_in_reach, (self.addresses[client] for client in others)))
        return [client for client, reaches in zip(others, reached, strict=True) if not reaches]

    def stalled(self) -> None:
        """Report that nobody in the job makes progress, so that hanging clients are dropped. First the ranks that wait
        for messages stop waiting, and vote. Another thread calls this regularly as long as it is so."""
        with self._lock:
            self._do(self._voter.stalled())

    def close(self) -> None:
        """Say that this rank is done."""
        with self._lock:
            self._do(self._voter.goodbye())

    def _wait(self, timeout_s: float) -> Decision:
        try:
            decided = self._inbox.get(timeout=timeout_s)
        except queue.Empty:
            raise DisconnectedError(
                f"no agreement within {timeout_s:g} s: not all ranks have voted",
                where=f"rank {self._rank}",
                fix="look for a rank that hangs; if it is only slow, raise cluster.timeout_s",
            ) from None
        if isinstance(decided, UserError):
            raise decided
        return decided

    def _follow(self) -> None:
        """Follow the active coordinator from client to client; the thread runs this."""
        while (coordinator := self._voter.coordinator) is not None:
            if self._line is None:
                self._connect(self.addresses[coordinator])
                continue
            wait_s = self._voter.deadline - time.monotonic()
            self._line.connection.settimeout(max(0.01, wait_s) if wait_s < threading.TIMEOUT_MAX else None)
            messages = self._line.receive()
            with self._lock:
                self._hear(messages)

    def _connect(self, address: tuple[str, int]) -> None:
        try:
            line = JsonConnection(socket.create_connection(address, CONNECT_S))
        except OSError:
            line = None
        with self._lock:
            self._line = line
            self._do(self._voter.ended() if line is None else self._voter.connected(time.monotonic()))

    def _hear(self, messages: list[Message] | None) -> None:
        """Handle messages or, with None, the end of the connection."""
        assert self._line is not None
        try:
            for message in messages or ():
                self._do(self._voter.heard(message, time.monotonic()))
        except (KeyError, TypeError, ValueError):  # not a coordinator of ours
            messages = None
        if messages is None and self._voter.out is None:
            self._line.end()
            self._line.connection.close()
            self._line = None
            self._do(self._voter.ended())

    def _do(self, effects: Effects) -> None:
        """Carry out effects of the voter; the caller holds the lock."""
        if self._voter.interrupted:
            self.interrupted.set()
        else:
            self.interrupted.clear()
        for effect in effects:
            if isinstance(effect, UserError):
                self.cut_off.set()
                self._inbox.put(effect)
            elif isinstance(effect, Decision):
                self._inbox.put(effect)
            elif self._line is not None:
                self._line.send(effect)


def open_votes(
    launch: Launch, layout: ClientLayout, store: JobStore, timeout_s: float, silence_s: float
) -> QuorumClient:
    """Start this client's coordinator, if this rank is its leader, and connect to the active one. All ranks call
    this."""
    client, coordinator = layout.client_of(launch.rank), None
    clients = launch.clients(layout)
    if launch.rank == layout.leader_of(client):
        assert store.address is not None, "a single process has nobody to vote with"
        coordinator = QuorumServer(layout, client, own_address(store.address), timeout_s, clients, silence_s)
    gathered = store.gather(launch, "coordinators", coordinator and coordinator.address)
    addresses: Addresses = {c: tuple(gathered[layout.leader_of(c)]) for c in clients}
    return QuorumClient(launch.rank, layout, addresses, timeout_s, silence_s, coordinator)

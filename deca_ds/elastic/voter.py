"""A rank's part in the membership protocol (protocol.py)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict

from deca_ds.elastic.decision import Decision
from deca_ds.elastic.protocol import ALIVE_S, GRACE_S, Message
from deca_ds.errors import CutOffError, UserError
from deca_ds.watchdog.restart import JOIN

Addresses = dict[int, tuple[str, int]]  # of every client's coordinator
Effects = list[Message | Decision | UserError]  # in this order: messages to send, decisions, why this client is out

_SILENT_S = 3 * ALIVE_S  # a coordinator that gives no sign of life for so long hangs, or did


class Voter:
    """The voter of rank `rank`. addresses: of the members' coordinators. timeout_s: time for all ranks to connect at
    the start of the job. silence_s: see Coordinator. asked: for a rejoining client, the client whose coordinator it has
    asked and is connected to.

    coordinator: the client to whose coordinator this rank is connected or has to connect; None once this rank is out,
    for the reason `out`. deadline: when the connection counts as lost if nothing comes. last: the last decision.
    interrupted: whether the next decision will not be a yes.
    """

    def __init__(
        self,
        rank: int,
        addresses: Mapping[int, tuple[str, int]],
        timeout_s: float,
        silence_s: float,
        asked: int | None = None,
    ):
        self._rank, self._timeout_s, self._silence_s = rank, timeout_s, silence_s
        self.addresses: Addresses = dict(addresses)
        self.last = Decision(0, 0, "", tuple(addresses))
        self.coordinator: int | None = self.last.clients[0] if asked is None else asked
        self.deadline, self.interrupted = math.inf, False
        self.out: UserError | None = None
        self._waits = asked is not None  # to be let in
        self._welcome = asked is not None  # the coordinator is active
        self._signed = -math.inf  # when it gave the last sign of life
        self._awake_since = -math.inf  # since when it has given them without a longer pause
        self._lost: list[int] = []  # clients whose coordinators are out of reach
        self._ballot: Message | None = None  # until it is decided

    def connected(self, now: float) -> Effects:
        """Handle a new connection to `coordinator`."""
        self.deadline = now + (self._silence_s if self._lost else self._timeout_s)
        return [{"kind": "hello", "rank": self._rank, "last": asdict(self.last), "lost": list(self._lost)}]

    def ended(self) -> Effects:
        """Handle a connection to `coordinator` that could not be made or has ended, or whose `deadline` is over."""
        assert self.coordinator is not None
        if self._waits:
            what = "the coordinator was lost before this client was let in"
            return self._end(CutOffError(what, fix="start it again"))
        self._lost.append(self.coordinator)
        self.interrupted, self._welcome, self._signed, self.deadline = True, False, -math.inf, math.inf
        left = [client for client in self.last.everybody if client not in self._lost]
        if not left:
            fix = "look at the network, and at whether this process was stopped for long"
            return self._end(CutOffError("no other client is in reach", where=f"rank {self._rank}", fix=fix))
        self.coordinator = left[0]
        return []

    def heard(self, message: Message, now: float) -> Effects:
        """Handle a message of `coordinator`. Raises KeyError, TypeError or ValueError if it makes no sense."""
        kind, effects = message["kind"], Effects()
        if now - self._signed >= _SILENT_S:
            self._awake_since = now
        self._signed = now
        if kind == "out":
            return self._end(
                CutOffError(
                    f"this client is out of the job: {message['why']}",
                    where=f"rank {self._rank}",
                    fix=f"to have it come back, mend that, and start its ranks again with {JOIN}",
                )
            )
        if kind == "welcome":
            self._welcome = True
            effects += [self._ballot] if self._ballot else []
        elif kind == "interrupt":
            self.interrupted = True
        elif kind == "addresses":
            self.addresses |= {client: (host, port) for client, host, port in message["addresses"]}
        elif kind == "decision":
            effects += self._decided(Decision.read(message))
        if self._lost and not self._welcome and now - self._awake_since >= 2 * GRACE_S:
            what = f"client {self.coordinator} has not lost the coordinator that this rank has lost: it is cut off"
            return self._end(CutOffError(what, where=f"rank {self._rank}", fix="look at the network"))
        if (self._welcome or self._lost) and not self._waits:
            self.deadline = now + self._silence_s
        return effects

    def ready(self) -> Effects:
        """Say that this client, which rejoins, only waits to be let in."""
        return self._said({"kind": "ready"})

    def vote(self, yes: int, announcement: str) -> Effects:
        """Vote with answers, a bit each, and a short text."""
        if self.out is not None:
            return [self.out]
        self._ballot = {"kind": "vote", "number": self.last.number + 1, "yes": yes, "announcement": announcement}
        return self._said(self._ballot)

    def stalled(self) -> Effects:
        """Handle that nobody in the job makes progress: before this rank votes, stop its waits; after that, report."""
        if self._ballot is None:
            self.interrupted = True
            return []
        return self._said({"kind": "stalled", "number": self._ballot["number"]})

    def leave(self, why: str) -> Effects:
        """Say that this client leaves the job."""
        return self._said({"kind": "leave", "why": why})

    def goodbye(self) -> Effects:
        """Say that this rank is done."""
        return self._said({"kind": "goodbye"})

    def _said(self, message: Message) -> Effects:
        """Send to an active coordinator only; the next one gets the vote again, and needs no other message."""
        return [message] if self._welcome and self.out is None else []

    def _decided(self, decision: Decision) -> Effects:
        if decision.number <= self.last.number:
            return []
        self.last, self._ballot, self._waits, self.interrupted = decision, None, False, False
        for client, host, port in decision.joining:
            self.addresses[client] = host, port
            self._lost = [lost for lost in self._lost if lost != client]
        return [decision]

    def _end(self, why: UserError) -> Effects:
        self.coordinator, self.out, self.interrupted = None, why, True
        return [why]

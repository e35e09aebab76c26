"""A rank of a simulated job: what its main thread does, as a program of a few lines (simulated_job.py).

The program follows elastic/survivor_commit.py and elastic/reconnect_gloo.py: it works with the others, votes, counts
what all say yes to, and after a loss meets those that are left. It yields what it waits for, with what that is about:

    busy, until when       a gradient
    meet, a key            messages, until all ranks of `members` have come to the same key; whether they have
    vote, bits, a place    a vote; the decision. place: for Checks
    admission              the decision that lets it in
    done, clients          their ends
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from deca_ds.elastic.decision import OPEN, YES, Decision
from deca_ds.elastic.protocol import Coordinator
from deca_ds.elastic.voter import Voter
from deca_ds.errors import UserError

if TYPE_CHECKING:
    from simulated_job import Connection, Job


class Process:
    """A rank in one life. waits: for what its main thread does, None when it is through or cannot continue."""

    def __init__(self, job: Job, rank: int, life: int):
        self.job, self.rank, self.life, self.client = job, rank, life, job.layout.client_of(rank)
        self.number = len(job.processes)
        self.thaws = 0.0
        self.alive, self.frozen, self.hangs, self.damaged, self.through = True, False, False, False, False
        self.voter: Voter | None = None
        self.coordinator: Coordinator | None = None
        self.connections: dict[int, Connection] = {}  # as a coordinator
        self.connection: Connection | None = None  # to one
        self.inbox: deque[Decision | UserError] = deque()
        self.asking: list[int] = []  # coordinators that a client that comes back has yet to ask
        self.asked: tuple[int, float] | None = None
        self.step, self.group, self.members = 0, 0, tuple(job.present)
        self.joining: tuple[int, ...] = ()
        self.store = job.present[0]
        self.program: Iterator[tuple[Any, ...]] | None = None
        self.waits: tuple[Any, ...] | None = None
        self.moved = job.now
        # for Checks
        self.log: list[Decision] = []
        self.cast: dict[int, tuple[Decision, int]] = {}
        self.counted: list[tuple[int, tuple[Any, ...]]] = []

    @property
    def name(self) -> str:
        return f"rank {self.rank}" + f" (life {self.life})" * (self.life > 0)

    @property
    def runs(self) -> bool:
        return self.alive and not self.frozen

    @property
    def leads(self) -> bool:
        return self.rank == self.job.layout.leader_of(self.client)

    def main(self, comes_back: bool) -> Iterator[tuple[Any, ...]]:
        if comes_back:
            decision = yield ("admission",)
            self.members, self.joining = decision.clients, decision.everybody[len(decision.clients) :]
            yield from self.connect_joining(decision.number)
            yield from self.together(("handover", self.client))
        while True:
            yield ("busy", self.job.now + self.job.random.uniform(0.5, 3.0))
            if newcomers := self.joining:
                yield from self.connect_joining(self.log[-1].number)
                for client in newcomers:
                    yield from self.together(("handover", client))
            if self.step >= self.job.steps:
                break
            yield from self.together(("step", self.step + 1), OPEN)
        for each in (1, 2):
            yield from self.together(("end", each))
        self.job.says(self, self.voter.goodbye())
        self.through = True
        if self.client == self.store and self.leads:  # JobGuard.finish: the store's host leaves last
            yield ("done", self.members)
        self.job.end(self)

    def together(self, what: tuple[Any, ...], bit: int = 0) -> Iterator[tuple[Any, ...]]:
        """See SurvivorCommit.run."""
        while True:
            if what == ("handover", self.client) and self.members == (self.client,):  # nobody is left to take over from
                self.job.kill(self)
                return
            done = yield ("meet", ("work", self.group, what))
            decision = yield ("vote", (YES if done else 0) | bit, ("work", what, self.members))
            if decision.clients == self.members:
                self.joining = decision.everybody[len(decision.clients) :]
                if decision.yes & YES:
                    if what[0] == "step":
                        self.step = what[1]
                    if what == ("handover", self.client):
                        self.step = self.job.handed[self.group, what]
                    self.job.checks.counts(self, decision, what)
                    return
            yield from self.reconnect()

    def reconnect(self) -> Iterator[tuple[Any, ...]]:
        """See ReconnectingGloo."""
        while True:
            self.members = self.voter.last.everybody
            decision = yield ("vote", YES, ("reconnect", None, self.members))
            if decision.clients == self.members and (yield from self.meet(decision.number)):
                return

    def connect_joining(self, number: int) -> Iterator[tuple[Any, ...]]:
        self.members, self.joining = (*self.members, *self.joining), ()
        if not (yield from self.meet(number)):
            yield from self.reconnect()

    def meet(self, number: int) -> Iterator[tuple[Any, ...]]:
        self.invite()
        met = yield ("meet", ("connect", number, None))
        decision = yield ("vote", YES if met else 0, ("connect", None, self.members))
        self.group = number
        return decision.clients == self.members and bool(decision.yes & YES)

    def invite(self) -> None:
        """Leaders keep up to date what a client that comes back is told; the store moves when its host is gone."""
        if self.store not in self.members:
            self.store = self.members[0]
        if self.coordinator is not None and not self.coordinator.retired:
            addresses = [(client, *address) for client, address in self.voter.addresses.items()]
            self.coordinator.invitation = {"store": ("store", self.store), "addresses": addresses}
            self.job.saved = dict(self.voter.addresses)

    def answer(self) -> Any:
        """With what the main thread can continue; None if it has to wait."""
        kind, *rest = self.waits
        if kind == "busy":
            return True if self.job.now >= rest[0] else None
        if kind == "done":
            return None if any(other.alive and not other.through for other in self.job.members(rest[0])) else True
        if kind == "meet":
            if self.voter.interrupted:
                return (False,)
            ranks = [rank for client in self.members for rank in self.job.layout.ranks_of(client)]
            entered = self.job.entered[rest[0]]
            return (True,) if all(rank in entered for rank in ranks) else None
        return self.inbox[0] if self.inbox else None

    def go_on(self, answer: Any) -> None:
        if answer != (False,):  # giving up is no progress
            self.moved = self.job.now
        if self.waits[0] in ("vote", "admission"):
            self.inbox.popleft()
        if isinstance(answer, UserError):
            self.job.checks.is_out(self)
            self.job.kill(self)
            return
        if isinstance(answer, tuple):
            answer = answer[0] and not self.damaged
            self.damaged = False
        self.resume(answer)

    def resume(self, answer: Any) -> None:
        try:
            self.waits = self.program.send(answer)
        except StopIteration:
            self.waits = None
        if not self.alive or self.waits is None:
            self.waits = None
            return
        kind, *rest = self.waits
        if kind == "meet":
            self.job.entered.setdefault(rest[0], set()).add(self.rank)
            if rest[0][2] is not None and rest[0][2] != ("handover", self.client):
                self.job.handed[self.group, rest[0][2]] = self.step
        elif kind == "vote":
            self.job.checks.votes(self, rest[0], rest[1])
            number = self.voter.last.number + 1
            self.job.says(self, self.voter.vote(rest[0], f"{self.number}:{number}"))

    def guard(self) -> None:
        """JobGuard, while a rank waits and nobody moves on."""
        if self.waits is None or self.voter is None:
            return
        if self.hangs:
            if self.voter.out or self.job.now - self.moved > self.job.silence_s + 20.0:
                self.job.kill(self)
            return
        if self.waits[0] in ("admission", "done"):
            return
        if self.waits[0] == "busy":
            self.moved = self.job.now
            return
        moved = max(other.moved for other in [self, *self.job.members(self.members)])
        self.job.checks.waits(self, moved)
        if self.job.now - moved > self.job.silence_s:
            self.job.says(self, self.voter.stalled())

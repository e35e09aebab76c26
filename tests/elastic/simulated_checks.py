"""What the membership protocol promises, checked on a simulated job (simulated_job.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deca_ds.elastic.decision import OPEN, YES, Decision
from deca_ds.elastic.protocol import Message

if TYPE_CHECKING:
    from simulated_job import Job
    from simulated_process import Process


LONG_S = 60.0  # to notice a loss, and to wait for those who do not come to the next coordinator


class Violation(AssertionError):
    """The protocol has done what it must not."""


class Checks:
    """What the protocol promises, each promise a method that is called when it could be broken.

    A part is a set of ranks that decide together. A network that falls apart may make several of one; then what one
    has decided and the other does not know is no promise any more, but neither part may ever mix with the other.
    """

    def __init__(self, job: Job):
        self._job = job
        self.decided: set[Decision] = set()
        self._by_number: dict[int, list[Process]] = {}  # who has learned of a decision
        self._places: dict[Decision, tuple[Any, ...]] = {}  # where programs stand after it

    def decides(self, process: Process, before: Decision, decision: Decision) -> None:
        """A decision is made once, of the votes that all ranks of its clients have given after the one before."""
        if decision in self.decided:
            return
        self.decided.add(decision)
        lines, yes = process.coordinator._lines, -1
        for client in decision.clients:
            for rank in self._job.layout.ranks_of(client):
                if rank not in lines and self._job.current[rank].through:
                    continue
                if rank not in lines:
                    raise Violation(f"{decision} without rank {rank}")
                voter = process.connections[lines[rank].connection].rank
                if voter.through:
                    continue
                parent, bits = voter.cast.get(decision.number, (None, 0))
                if parent is None or (parent.number and parent != before):
                    raise Violation(f"{decision} follows {before}, but {voter.name} has voted after {parent}")
                yes &= bits
        if decision.yes != yes:
            raise Violation(f"{decision} is not what all have voted: {yes}")
        self._lets_in(before, decision)

    def _lets_in(self, before: Decision, decision: Decision) -> None:
        """Nobody comes in without the votes of all, nor along with a loss; nobody comes in otherwise."""
        if decision.joining and (not decision.yes & YES or not decision.yes & OPEN):
            raise Violation(f"{decision} lets somebody in though not all are open to it")
        if decision.joining and decision.clients != before.everybody:
            raise Violation(f"{decision} lets somebody in during a loss: before, {before.everybody} were in")
        if not set(decision.clients) <= set(before.everybody):
            raise Violation(f"{decision} has clients that were not in {before}")

    def learns(self, process: Process, decision: Decision) -> None:
        """No rank misses a decision, and those that share one share all before it since the later of them came in."""
        if process.log and decision.number != process.log[-1].number + 1:
            raise Violation(f"{process.name} knows {process.log[-1].number}, then {decision.number}")
        if not process.log and process.life == 0 and decision.number != 1:
            raise Violation(f"{process.name} knows {decision.number} first")
        if decision not in self.decided:
            raise Violation(f"{process.name} is told of {decision}, which nobody has decided")
        if process.client not in decision.everybody:
            raise Violation(f"{process.name} is told of {decision}, which is without it")
        process.log.append(decision)
        for other in self._by_number.get(decision.number, ()):
            self._shares(process, other, decision)
        self._by_number.setdefault(decision.number, []).append(process)

    def _shares(self, process: Process, other: Process, decision: Decision) -> None:
        """No two views with one number in a part: what differs, differs for ever."""
        theirs = other.log[decision.number - other.log[0].number]
        if theirs != decision or len(process.log) < 2 or decision.number == other.log[0].number:
            return
        before = other.log[decision.number - 1 - other.log[0].number]
        if process.log[-2] != before:
            raise Violation(f"{process.name} and {other.name} share {decision}, but not the one before")

    def votes(self, process: Process, yes: int, place: tuple[Any, ...]) -> None:
        """Who votes after one decision is at one place of the same work; who was dropped does not vote any more."""
        last = process.voter.last
        if process.client not in last.everybody:
            raise Violation(f"{process.name} votes, though {last} is without it")
        if process.voter.out is None:
            process.cast[last.number + 1] = last, yes
        if self._places.setdefault(last, place) != place and last.number:
            raise Violation(f"after {last}, {process.name} is at {place}, others are at {self._places[last]}")

    def counts(self, process: Process, decision: Decision, what: tuple[Any, ...]) -> None:
        """No inner step is lost or applied twice: they count one after the other, each by a decision of its own."""
        if process.log[-1] != decision or not decision.yes & YES:
            raise Violation(f"{process.name} counts {what} by {decision}")
        steps = [counted[1] for _, counted in process.counted if counted[0] == "step"]
        if what[0] == "step" and steps and what[1] != steps[-1] + 1:
            raise Violation(f"{process.name} counts step {what[1]} after {steps[-1]}")
        process.counted.append((decision.number, what))

    def sends(self, process: Process, message: Message) -> None:
        """Who is out says nothing any more."""
        if process.voter.out is not None:
            raise Violation(f"{process.name} is out, and sends {message}")

    def is_out(self, process: Process) -> None:
        """Nobody is dropped who has done nothing wrong, unless connections broke between those who live."""
        if process.through:
            raise Violation(f"{process.name} is through and told to be out")
        if self._job.clean and process.log and (process.client, process.life) not in self._job.faulty:
            raise Violation(f"{process.name} is out though nothing was wrong with it: {process.voter.out}")

    def waits(self, process: Process, moved: float) -> None:
        """Where nobody hangs, nobody waits for long after a death, even if that is not noticed at once; at the start of
        the job, before the first decision, all wait longer for those who have never come."""
        job = self._job
        if process.log and job.clean and not job.slow and job.now - max(moved, job.struck) > LONG_S:
            raise Violation(f"{process.name} waits in vain: {process.waits}")

    def comes_to_an_end(self, seconds: float = 600.0) -> None:
        """Everybody who lives decides in the end, or is told that it is out; those who end together have counted the
        same, from where the later of them came in."""
        job = self._job
        end = job.now + seconds
        while job.now < end and any(p.alive and not p.through and p.voter is not None for p in job.processes):
            job.tick(1.0)
        left = [p for p in job.processes if p.alive and not p.through and p.voter is not None]
        if left:
            what = "; ".join(f"{p.name} {p.waits}, coordinator {p.voter.coordinator}" for p in left)
            raise Violation(f"do not come to an end: {what}")
        ended = [process for process in job.processes if process.through]
        for one in ended:
            for other in ended:
                if one.log[-1] == other.log[-1]:
                    first = max(one.counted[0][0], other.counted[0][0])
                    theirs = [[each for each in p.counted if each[0] >= first] for p in (one, other)]
                    if theirs[0] != theirs[1]:
                        raise Violation(f"{one.name} and {other.name} have counted other commits: {theirs}")

    def is_one_part(self) -> None:
        """Where no connection broke between those who live, all of them have ended the training by one decision. A rank
        that is left alone after that one says its goodbyes to nobody."""
        ended = {process.name: self._end_of(process) for process in self._job.processes if process.through}
        if len(set(ended.values())) > 1:
            raise Violation(f"several parts: {ended}")

    def _end_of(self, process: Process) -> Decision:
        """The decision by which it has ended the training: the first of the two agreements at the end."""
        number = next(number for number, what in process.counted if what == ("end", 1))
        return process.log[number - process.log[0].number]

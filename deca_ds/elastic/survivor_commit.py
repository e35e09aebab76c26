"""The commit of a job whose clients may die: work counts for all survivors, or is repeated without the dead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from deca_ds.errors import DisconnectedError, MessageError
from deca_ds.launch.progress import EVERYBODY, Progress
from deca_ds.launch.view import View
from deca_ds.printing import print_wrapped
from deca_ds.transport import Commit, Result

_SPURIOUS = 3  # so many exchanges may fail in a row although no client has died


@dataclass
class Question:
    """A further question that every agreement asks all ranks. answer: gives this rank's answer. heard: called with
    whether all ranks have said yes."""

    answer: Callable[[], bool]
    heard: Callable[[bool], None]


class Reconnecting(Protocol):
    """A transport that can connect again without dead clients."""

    progress: Progress

    @property
    def members(self) -> View:
        """The clients in the job."""
        ...

    def give_up(self) -> None:
        """Release the ranks that wait for this rank's messages, directly or indirectly."""
        ...

    def agree(self, answers: Sequence[bool]) -> list[bool]:
        """Return for each question whether all survivors say yes, the same to all. Empty if a client has died."""
        ...

    def reconnect(self) -> bool:
        """Reconnect the remaining clients and change `membership`; returns whether there are fewer now."""
        ...


class SurvivorCommit(Commit):
    """See Commit; `run` continues without clients that have died."""

    may_repeat = True

    def __init__(self, connections: Reconnecting):
        self._connections = connections
        self._questions: list[Question] = []

    @property
    def members(self) -> View:
        """The clients in the job."""
        return self._connections.members

    def also_ask(self, question: Question) -> None:
        """Ask this with every agreement from here on; all ranks ask the same questions, in the same order."""
        self._questions.append(question)

    def run(self, work: Callable[[], Result], *, last: bool = False) -> Result:
        """See Commit. Raises RankLostError if this client has lost a rank, DisconnectedError if messages keep failing
        although no client has died."""
        spurious, connections, progress = 0, self._connections, self._connections.progress
        last_error: MessageError | None = None
        while spurious < _SPURIOUS:
            error: MessageError | None = None
            try:
                result = work()
            except MessageError as failed:
                error = last_error = failed
                connections.give_up()
            own = [error is None, last, *(question.answer() for question in self._questions)]
            with progress.waiting(EVERYBODY):
                answers = connections.agree(own)
            if answers and answers[0]:
                for question, all_said_yes in zip(self._questions, answers[2:], strict=True):
                    question.heard(all_said_yes)
                return result
            with progress.waiting(EVERYBODY):
                spurious = 0 if connections.reconnect() else spurious + 1
            if spurious and error is not None:
                print_wrapped(f"WARNING: {progress.place}: {error.what}; sent again")
        raise DisconnectedError(
            f"messages keep failing, though all clients are there: {last_error or 'another rank says so'}",
            where=progress.place,
            fix="look at the output of the other ranks; all of them must run the same configuration",
        )


def bits(answers: Sequence[bool]) -> int:
    """Write answers as bits of a number, the first answer lowest; the first two are decision.YES and decision.OPEN."""
    return sum(1 << place for place, yes in enumerate(answers) if yes)


def answers_in(number: int, count: int) -> list[bool]:
    """Read the answers in the bits of a number."""
    return [bool(number >> place & 1) for place in range(count)]

"""What transports that outlive dead clients have in common: exchanges count for all survivors, or are done again."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deca_ds.errors import GossipError, MessageError
from deca_ds.launch.progress import EVERYBODY
from deca_ds.launch.view import View
from deca_ds.transport.transport import PointToPoint, Result

_SPURIOUS = 3  # failed exchanges in a row after which everybody is still there: then it is no death


@dataclass
class Question:
    """What every agreement asks all ranks beside. answer: this rank's. heard: called with whether all have said yes."""

    answer: Callable[[], bool]
    heard: Callable[[bool], None]


class Surviving(PointToPoint):
    """A transport whose `together` goes on without clients that have died.

    announcement: what the leader of the first client of a new view tells the others (see View); the view changes when
    all that are left have agreed on it. peers_of: whom a connection joins for a client, by the numbers that `exchange`
    takes: the client itself, or all of its ranks, as UnevenTransport needs it.
    """

    may_lose_clients = True

    def __init__(self, client: int, clients: int):
        super().__init__(client, clients)
        self._questions: list[Question] = []
        self.announcement: Callable[[View], str] = lambda view: ""
        self.peers_of: Callable[[int], Sequence[int]] = lambda client: (client,)

    def also_ask(self, question: Question) -> None:
        """With every agreement from here on; all ranks ask the same, in the same order."""
        self._questions.append(question)

    @property
    def _peers(self) -> list[int]:
        """Whom the connections join, in their order there."""
        return [peer for client in self.members.clients for peer in self.peers_of(client)]

    def _place(self, peer: int) -> int:
        """See PointToPoint."""
        return self._peers.index(peer)

    def together(self, work: Callable[[], Result], *, last: bool = False) -> Result:
        """See Transport. Raises RankLostError if this client has lost a rank, GossipError if messages fail though
        nobody has died."""
        spurious = 0
        last_error: MessageError | None = None
        while spurious < _SPURIOUS:
            error: MessageError | None = None
            try:
                result = work()
            except MessageError as failed:
                error = last_error = failed
                self._give_up()
            own = [error is None, last, *(question.answer() for question in self._questions)]
            with self.progress.waiting(EVERYBODY):
                answers = self._agree(own)
            if answers and answers[0]:
                for question, all_said_yes in zip(self._questions, answers[2:], strict=True):
                    question.heard(all_said_yes)
                return result
            with self.progress.waiting(EVERYBODY):
                spurious = 0 if self._rebuild() else spurious + 1
            if spurious and error is not None:
                print(f"WARNING: {self.progress.place}: {error.what}; sent again", file=sys.stderr, flush=True)
        raise GossipError(
            f"messages fail again and again, though all clients are there: {last_error or 'another rank says so'}",
            where=self.progress.place,
            fix="look at the output of the other ranks; all of them must run the same configuration",
        )

    @abstractmethod
    def _give_up(self) -> None:
        """Let those that wait for this rank's messages, or for messages of those who wait, do so no more."""

    @abstractmethod
    def _agree(self, answers: Sequence[bool]) -> list[bool]:
        """Whether all survivors say yes, question by question, the same for all of them; empty if one has died."""

    @abstractmethod
    def _rebuild(self) -> bool:
        """Connect those who are left anew, change `membership`; whether there are fewer now."""


def bits(answers: Sequence[bool]) -> int:
    """Answers as the bits of a number, the first one the lowest; the first two are agreement.YES and OPEN."""
    return sum(1 << place for place, yes in enumerate(answers) if yes)


def answers_in(number: int, count: int) -> list[bool]:
    """The inverse of `bits`."""
    return [bool(number >> place & 1) for place in range(count)]

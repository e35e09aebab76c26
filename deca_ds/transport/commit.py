"""Work that counts for all ranks of all clients or for none."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


class Commit:
    """Where a client that dies ends the job, work that is through counts. elastic/survivor_commit.py has the other one.

    may_repeat: whether `run` may run work again.
    """

    may_repeat = False

    def run(self, work: Callable[[], Result], *, last: bool = False) -> Result:
        """Run `work`, exchanges that every rank of every client runs at this place, until it counts for all of them.

        Where a client may die, all survivors agree that they are through; if not, they let go of what was received and
        of the dead clients, and run `work` again. So it may be repeated, does nothing but exchange (a collective inside
        the client would wait for a rank that has given up), and what follows from it comes after. last: nothing else is
        exchanged before the end of the inner step, where a client may then come back.
        """
        return work()

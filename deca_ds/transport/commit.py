"""Work that counts for all ranks of all clients or for none."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


class Commit:
    """The commit of a job that ends when a client dies: completed work counts. elastic/survivor_commit.py has the one
    for jobs whose clients may die.

    may_repeat: whether `run` may run work again.
    """

    may_repeat = False

    def run(self, work: Callable[[], Result], *, last: bool = False) -> Result:
        """Run `work`, which every rank of every client runs at this place, until it counts for all of them.

        If clients may die, all survivors agree whether they have completed it; if not, they discard what they received,
        drop the dead clients, and run `work` again. So `work` must be repeatable and only exchange messages (a
        collective inside the client would wait for a rank that has given up); act on its result after `run` returns.
        last: whether this is the last exchange of the inner step, after which a client may come back.
        """
        return work()

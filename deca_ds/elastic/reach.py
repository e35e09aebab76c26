"""Who leaves when some clients cannot reach each other, though all of them reach the coordinator.

Every client votes whom it cannot reach, a bit for each ordered pair of clients, so that one agreement tells all of them
the same. Clients leave until every pair of those who stay can meet: first the one that most cannot reach.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from deca_ds.elastic.agreement import OPEN, YES
from deca_ds.errors import DisconnectedError

_ATTEMPTS = 4  # in a row to meet, by the same clients
_FIRST = 2  # bit: those below are agreement.YES and OPEN

Pair = tuple[int, int]  # clients, the smaller number first


def vote(through: bool, client: int, out_of_reach: Collection[int], total: int) -> int:
    """What a rank of `client`, of `total` clients, says after an attempt to meet: a number to be joined by AND.

    It lets nobody in: those who meet are not where a client that comes back could take over.
    """
    apart = sum(1 << _FIRST + client * total + other for other in out_of_reach)
    return ~apart & ~OPEN & (-1 if through else ~YES)


def pairs_apart(yes: int, clients: Sequence[int], total: int) -> set[Pair]:
    """The pairs of `clients` of which one has said in its `vote` that it does not reach the other."""
    return {
        (min(one, other), max(one, other))
        for one in clients
        for other in clients
        if one != other and not yes >> _FIRST + one * total + other & 1
    }


def who_leaves(apart: Collection[Pair], clients: Sequence[int]) -> list[int]:
    """Those of `clients` without whom no pair is apart: whoever is in most pairs first, of equals the last one."""
    left, leaving = set(apart), []
    while left:
        count = Counter(client for pair in left for client in pair)
        leaving.append(max(count, key=lambda client: (count[client], clients.index(client))))
        left = {pair for pair in left if leaving[-1] not in pair}
    return leaving


class Attempts:
    """Of the same clients to meet, one after another. A pair counts as apart when it was so twice in a row."""

    def __init__(self) -> None:
        self._clients: tuple[int, ...] = ()
        self._apart: set[Pair] = set()
        self._failed = 0

    def failed(self, clients: tuple[int, ...], apart: set[Pair]) -> list[int]:
        """Who leaves now. Raises DisconnectedError if it has failed too often for no reason that anybody sees."""
        if clients != self._clients:
            self._clients, self._apart, self._failed = clients, set(), 0
        self._failed += 1
        leaving = who_leaves(self._apart & apart, clients)
        self._apart = apart
        if self._failed == _ATTEMPTS and not leaving:
            raise DisconnectedError(
                f"{len(clients)} clients have tried {_ATTEMPTS} times to connect anew, in vain, though all of them "
                "reach each other's coordinators",
                fix="look for a firewall that lets through only some ports; on several networks set GLOO_SOCKET_IFNAME",
            )
        return leaving

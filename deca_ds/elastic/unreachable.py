"""Which clients leave when some cannot reach each other, though all of them reach the coordinator.

Every client votes on whom it cannot reach, a bit for each ordered pair of clients, so that all clients learn the same
from one agreement. Clients leave until every remaining pair can connect; the first to leave is the client that the most
others cannot reach.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from deca_ds.elastic.decision import OPEN, YES
from deca_ds.errors import DisconnectedError

_ATTEMPTS = 4  # of the same clients to connect, in a row
_FIRST = 2  # the lowest bit for a pair: the bits below are decision.YES and decision.OPEN

Pair = tuple[int, int]  # clients, the smaller number first


def vote(through: bool, client: int, out_of_reach: Collection[int], total: int) -> int:
    """Return the vote of a rank of `client`, of `total` clients, after an attempt to connect. through: whether the rank
    has connected.

    The vote lacks OPEN: in the middle of an attempt, no client can rejoin and take over the state.
    """
    apart = sum(1 << _FIRST + client * total + other for other in out_of_reach)
    return ~apart & ~OPEN & (-1 if through else ~YES)


def pairs_apart(yes: int, clients: Sequence[int], total: int) -> set[Pair]:
    """Return the pairs of `clients` in which one has said in its `vote` that it does not reach the other."""
    return {
        (min(one, other), max(one, other))
        for one in clients
        for other in clients
        if one != other and not yes >> _FIRST + one * total + other & 1
    }


def who_leaves(apart: Collection[Pair], clients: Sequence[int]) -> list[int]:
    """Return clients without which no pair is apart. Those in the most pairs go first; of equals, the last in line."""
    left, leaving = set(apart), []
    while left:
        count = Counter(client for pair in left for client in pair)
        leaving.append(max(count, key=lambda client: (count[client], clients.index(client))))
        left = {pair for pair in left if leaving[-1] not in pair}
    return leaving


class Attempts:
    """Successive attempts of the same clients to connect. A pair counts as apart when it was so twice in a row."""

    def __init__(self) -> None:
        self._clients: tuple[int, ...] = ()
        self._apart: set[Pair] = set()
        self._failed = 0

    def failed(self, clients: tuple[int, ...], apart: set[Pair]) -> list[int]:
        """Return the clients that leave now. Raises DisconnectedError after too many failures that no pair explains."""
        if clients != self._clients:
            self._clients, self._apart, self._failed = clients, set(), 0
        self._failed += 1
        leaving = who_leaves(self._apart & apart, clients)
        self._apart = apart
        if self._failed == _ATTEMPTS and not leaving:
            raise DisconnectedError(
                f"{len(clients)} clients have failed {_ATTEMPTS} times to reconnect, though all of them reach each "
                "other's coordinators",
                fix="look for a firewall that lets through only some ports; on several networks set GLOO_SOCKET_IFNAME",
            )
        return leaving

"""When a network that fell into parts is whole again, the smaller part finds the larger one."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Sequence

from deca_ds.elastic.quorum_client import QuorumClient
from deca_ds.elastic.wire import JsonConnection
from deca_ds.launch.view import Membership

_EVERY_S = 3.0
_TIMES = 3  # so often in a row the lookout has to see the other part
_CONNECT_S = 2.0


def goes_first(part: Sequence[int], other: Sequence[int]) -> bool:
    """Return whether the clients of `part` continue and those of `other` rejoin them. The larger part continues; of two
    equally large ones, the one with the lowest client number. Both parts come to the same answer."""
    return (len(part), -min(part)) > (len(other), -min(other))


class Lookout:
    """A thread on a client's leader. While its client is the first of a part, it asks the coordinators of all clients
    that the part has lost whether they are active.

    A coordinator that has only just been cut off, and has not noticed yet, still counts clients that it has lost:
    clients of this part, or so many others that fewer than `min_clients` are really left. So the lookout believes an
    answer only if it names no client of this part and at least `min_clients`, several times in a row.
    every_s: seconds between two looks. found: whether there is a part that goes first.
    """

    def __init__(
        self,
        membership: Membership,
        votes: QuorumClient,
        client: int,
        min_clients: int,
        every_s: float = _EVERY_S,
    ):
        self._membership, self._votes, self._client, self._min_clients = membership, votes, client, min_clients
        self._every_s = every_s
        self.found = False
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        times = 0
        while not self.found:
            time.sleep(self._every_s)
            times = times + 1 if self._sees_one_that_goes_first() else 0
            self.found = times == _TIMES

    def _sees_one_that_goes_first(self) -> bool:
        part = self._membership.view
        if part.first != self._client:
            return False
        lost = [client for client in self._votes.addresses if client not in part]
        others = (clients_at(self._votes.addresses[client]) for client in lost)
        return any(
            len(other) >= self._min_clients
            and not set(other).intersection(part.clients)
            and goes_first(other, part.clients)
            for other in others
        )


def clients_at(address: tuple[str, int]) -> list[int]:
    """Ask the coordinator at `address` for its members; there are none if it is inactive or out of reach."""
    with (
        contextlib.suppress(OSError, KeyError, TypeError, ValueError),  # a stranger may answer
        socket.create_connection(address, _CONNECT_S) as connection,
    ):
        line = JsonConnection(connection)
        line.send({"kind": "who"})
        return [int(client) for client in line.answer(time.monotonic() + _CONNECT_S)["clients"]]
    return []

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
_TIMES = 3  # in a row that it has to be seen
_CONNECT_S = 2.0


def goes_first(part: Sequence[int], other: Sequence[int]) -> bool:
    """Whether the clients of `part` go on as they are and those of `other` come to them: the larger part does, of two
    that are as large the one with the lowest client number. Both parts say the same."""
    return (len(part), -min(part)) > (len(other), -min(other))


class Lookout:
    """A thread of a client's leader. While its client is the first of a part, it asks the coordinators of all clients
    that the part has lost whether they are at work.

    A coordinator that has only just been cut off, and does not know yet, counts clients that it has lost: of this part,
    too, or so that without them `min_clients` would not be reached. So what it says has to fit, and to be said again.
    found: whether there is a part that goes first.
    """

    def __init__(self, membership: Membership, votes: QuorumClient, client: int, min_clients: int):
        self._membership, self._votes, self._client, self._min_clients = membership, votes, client, min_clients
        self.found = False
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        times = 0
        while not self.found:
            time.sleep(_EVERY_S)
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
    """The clients of the coordinator at `address`; none if it is not at work or out of reach."""
    with contextlib.suppress(OSError, KeyError, TypeError), socket.create_connection(address, _CONNECT_S) as connection:
        line = JsonConnection(connection)
        line.send({"kind": "who"})
        for message in line.receive() or []:
            return [int(client) for client in message["clients"]]
    return []

"""The network of a simulated job (simulated_job.py)."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from deca_ds.elastic.protocol import Message

if TYPE_CHECKING:
    from simulated_process import Process

END: Message = {"kind": "end"}


class Connection:
    """Of a rank's process to a coordinator's. up, down: what is under way, with the time at which it may arrive."""

    def __init__(self, number: int, rank: Process, coordinator: Process):
        self.number, self.rank, self.coordinator = number, rank, coordinator
        self.up: deque[tuple[float, Message]] = deque()
        self.down: deque[tuple[float, Message]] = deque()
        self.rank_has_it = self.coordinator_has_it = True
        self.late_s = 0.0
        self.blocked_since: float | None = None


class Network:
    """connections: those that one end has at least. blocked: pairs of clients that do not reach each other."""

    now: float

    def __init__(self) -> None:
        self.connections: list[Connection] = []
        self.blocked: set[frozenset[int]] = set()
        self._made = 0

    def cut(self, connection: Connection, lose: bool = False, after_s: float = 0.0) -> None:
        """The connection breaks. lose: what is under way. after_s: until those who live notice."""
        for queue in (connection.up, connection.down):
            if lose:
                queue.clear()
            queue.append((self.now + after_s, END))

    def notice(self, process: Process, after_s: float) -> None:
        """Its connection has broken, which it notices only then; nothing comes until then."""
        process.connection.down.clear()
        process.connection.down.append((self.now + after_s, END))

    def set_apart(self, clients: set[int], others: set[int], apart: bool) -> None:
        pairs = {frozenset((one, other)) for one in clients for other in others if one != other}
        self.blocked = self.blocked | pairs if apart else self.blocked - pairs

    def open(self, process: Process, address: tuple[str, int], message: list[Message]) -> bool:
        other = self.processes[address[1]]
        apart = frozenset((process.client, other.client)) in self.blocked
        if apart or not other.alive or other.coordinator is None or other.coordinator.retired:
            return False
        self._made += 1
        connection = Connection(self._made, process, other)
        self.connections.append(connection)
        process.connection = other.connections[connection.number] = connection
        for each in message:
            connection.up.append((self.now, each))
        return True

    def blocks(self, connection: Connection) -> bool:
        return frozenset((connection.rank.client, connection.coordinator.client)) in self.blocked

    def forget(self, connection: Connection) -> None:
        if not connection.rank_has_it and not connection.coordinator_has_it and connection in self.connections:
            self.connections.remove(connection)

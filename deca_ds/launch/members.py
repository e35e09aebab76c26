"""Which clients are still in the job."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Members:
    """The clients that train, by their numbers. One object for everybody in a rank who asks.

    total: clients of the run. clients: those that are there, at the start by default all of them; ascending, but that
    those who have come later are the last. They change only where all survivors agree on it, so that all ranks always
    see the same.
    """

    total: int
    clients: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.clients = tuple(range(self.total))

    def __len__(self) -> int:
        return len(self.clients)

    @property
    def first(self) -> int:
        """The client whose leader speaks for the job."""
        return self.clients[0]

    @property
    def missing(self) -> tuple[int, ...]:
        return tuple(client for client in range(self.total) if client not in self.clients)

    def place(self, client: int) -> int:
        """Where the client stands among those that are left."""
        return self.clients.index(client)

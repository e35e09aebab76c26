"""What the ranks agree on (protocol.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

YES, OPEN = 1, 2  # bits of a vote: the work since the last decision counts; a client may rejoin after it


@dataclass(frozen=True)
class Decision:
    """The decision of agreement `number`. yes: the bits to which all ranks have voted yes. announcement: of the first
    client's leader. clients: the members, the coordinator's first. joining: the clients that rejoin now, with their
    coordinators' addresses."""

    number: int
    yes: int
    announcement: str
    clients: tuple[int, ...]
    joining: tuple[tuple[int, str, int], ...] = ()

    @property
    def everybody(self) -> tuple[int, ...]:
        """The members from now on, in the order in which they become coordinator."""
        return (*self.clients, *(client for client, _, _ in self.joining))

    @staticmethod
    def read(message: dict[str, Any]) -> Decision:
        """Read a message. Raises KeyError, TypeError or ValueError if it is no decision."""
        joining = tuple((client, host, port) for client, host, port in message["joining"])
        return Decision(message["number"], message["yes"], message["announcement"], tuple(message["clients"]), joining)

"""What the ranks agree on (protocol.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

YES, OPEN = 1, 2  # bits of a vote: that this counts; that a returning client may come in after it


@dataclass(frozen=True)
class Decision:
    """Of agreement `number`. yes: bit by bit, whether all have said so. news: what the first client's leader had to
    tell. clients: who is in, the coordinator's first. joining: who comes in now, with its coordinator's address."""

    number: int
    yes: int
    news: str
    clients: tuple[int, ...]
    joining: tuple[tuple[int, str, int], ...] = ()

    @property
    def everybody(self) -> tuple[int, ...]:
        """Who is in from now on, in the order in which they become coordinator."""
        return (*self.clients, *(client for client, _, _ in self.joining))

    @staticmethod
    def read(message: dict[str, Any]) -> Decision:
        joining = tuple((client, host, port) for client, host, port in message["joining"])
        return Decision(message["number"], message["yes"], message["news"], tuple(message["clients"]), joining)

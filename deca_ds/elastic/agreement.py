"""What agreements are made of (server.py): decisions, and connections that carry lines of JSON."""

from __future__ import annotations

import contextlib
import json
import socket
from dataclasses import dataclass
from typing import Any

from deca_ds.watchdog.lifelines import keep_alive

_MOST_BYTES = 2**20  # of a message
_CONNECT_S = 5.0
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


def is_in_reach(address: tuple[str, int]) -> bool:
    """Whether somebody can be connected to at `address`."""
    with contextlib.suppress(OSError), socket.create_connection(address, _CONNECT_S):
        return True
    return False


class JsonConnection:
    """A connection that carries lines of JSON. rank: whose it is. known: number of the last decision sent to it.
    Of a returning client, ready: whether it only waits to come in; address: of its coordinator, from its leader; store:
    address of the job's when it was invited."""

    def __init__(self, connection: socket.socket):
        keep_alive(connection)
        self.connection = connection
        self.rank: int | None = None
        self.known = -1
        self.ready = False
        self.address: tuple[str, int] | None = None
        self.store: tuple[str, int] | None = None
        self._text = bytearray()

    def send(self, kind: str, **message: Any) -> bool:
        """Whether the system took it."""
        try:
            self.connection.sendall(json.dumps({"kind": kind, **message}).encode() + b"\n")
        except OSError:
            return False
        return True

    def receive(self) -> list[dict[str, Any]] | None:
        """Messages, after waiting for some bytes; None at the end of the connection, or if they make no sense."""
        try:
            more = self.connection.recv(_MOST_BYTES)
            self._text += more
            *lines, rest = self._text.split(b"\n")
            if not more or len(rest) > _MOST_BYTES:
                return None
            self._text = rest
            messages = [json.loads(line) for line in lines]
        except (OSError, ValueError):
            return None
        return messages if all(isinstance(message, dict) for message in messages) else None

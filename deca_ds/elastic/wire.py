"""The protocol's messages on a socket (protocol.py): lines of JSON."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from typing import Any

from deca_ds.watchdog.lifelines import keep_alive

_MOST_BYTES = 2**20  # of a message
CONNECT_S = 5.0


def is_in_reach(address: tuple[str, int]) -> bool:
    """Return whether this host can connect to `address`."""
    with contextlib.suppress(OSError), socket.create_connection(address, CONNECT_S):
        return True
    return False


class JsonConnection:
    """A connection that carries lines of JSON."""

    def __init__(self, connection: socket.socket):
        keep_alive(connection)
        self.connection = connection
        self._text = bytearray()

    def send(self, message: dict[str, Any]) -> None:
        """Send a message; an error shows later, as the end of the connection."""
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """Wait for bytes, and return the messages in them; None at the end of the connection, or if they are no JSON
        objects."""
        try:
            more = self.connection.recv(_MOST_BYTES)
            self._text += more
            *lines, rest = self._text.split(b"\n")
            if not more or len(rest) > _MOST_BYTES:
                return None
            self._text = rest
            messages = [json.loads(line) for line in lines]
        except (OSError, ValueError, RecursionError):
            return None
        return messages if all(isinstance(message, dict) for message in messages) else None

    def answer(self, until: float) -> dict[str, Any]:
        """Wait for a message, until the time `until` by time.monotonic(), and return it; of several that come together
        the last one. Empty if there is none: the other end is gone, silent, or does not speak this protocol."""
        messages: list[dict[str, Any]] | None = []
        while messages == [] and (left_s := until - time.monotonic()) > 0:
            self.connection.settimeout(left_s)
            messages = self.receive()
        self.connection.settimeout(None)
        return messages[-1] if messages else {}

    def end(self) -> None:
        """End the connection for both sides; `receive` then returns None."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

"""A thread that runs a client's coordinator: it listens, and sends what the protocol says (protocol.py)."""

from __future__ import annotations

import selectors
import socket
import threading
import time
from collections.abc import Sequence
from itertools import count

from deca_ds.elastic.protocol import Coordinator, Message, Sends
from deca_ds.elastic.wire import JsonConnection
from deca_ds.errors import in_words
from deca_ds.launch import ClientLayout
from deca_ds.printing import print_wrapped


class QuorumServer:
    """Runs a Coordinator, whose parameters it takes. host: the address to listen at. address: where ranks reach it."""

    def __init__(
        self, layout: ClientLayout, client: int, host: str, timeout_s: float, clients: Sequence[int], silence_s: float
    ):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._server = socket.create_server((host, 0), family=family, backlog=1024)
        self.address: tuple[str, int] = self._server.getsockname()[:2]
        self._coordinator = Coordinator(layout, client, clients, timeout_s, silence_s, time.monotonic())
        self._look_s = min(0.5, silence_s / 20)
        self._connections: dict[int, JsonConnection] = {}
        self._refused = False  # whether the last connection could not be taken
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def invitation(self) -> Message | None:
        """What a rejoining client has to know."""
        return self._coordinator.invitation

    def invite(self, invitation: Message) -> None:
        """Send this to rejoining clients from now on. The leader calls this from its own thread, again after each
        change."""
        self._coordinator.invite(invitation)

    def _serve(self) -> None:
        numbers = count()
        with selectors.DefaultSelector() as ready:
            ready.register(self._server, selectors.EVENT_READ, None)
            while not self._coordinator.retired:
                heard = ready.select(timeout=self._look_s)
                self._send(self._coordinator.awake(time.monotonic()))
                for key, _ in heard:
                    if key.data is None:
                        if (connection := self._accept()) is not None:
                            self._connections[number := next(numbers)] = connection
                            ready.register(connection.connection, selectors.EVENT_READ, number)
                    elif (messages := self._connections[key.data].receive()) is None:
                        ready.unregister(key.fileobj)
                        self._connections.pop(key.data).connection.close()
                        self._send(self._coordinator.ended(key.data))
                    else:
                        self._hear(key.data, messages)
                self._send(self._coordinator.passed(time.monotonic()))
        self._server.close()
        for connection in self._connections.values():
            connection.end()

    def _accept(self) -> JsonConnection | None:
        """Return the next connection; None if there is none after all: its other end is gone again, or this process has
        too many files open, which others may close in time."""
        try:
            connection = JsonConnection(self._server.accept()[0])
            self._refused = False
            return connection
        except OSError as error:
            if not self._refused:
                self._refused = True
                host, port = self.address
                print_wrapped(f"WARNING: {host} {port} cannot take a connection for now: {in_words(error)}")
            time.sleep(self._look_s)
            return None

    def _hear(self, number: int, messages: list[Message]) -> None:
        try:
            for message in messages:
                self._send(self._coordinator.heard(number, message, time.monotonic()))
        except (KeyError, TypeError, ValueError):  # not one of our ranks
            self._connections[number].end()

    def _send(self, sends: Sends) -> None:
        for number, message in sends:
            if number in self._connections:
                self._connections[number].send(message)

"""Part of the agent: a connection between two hosts, timed. The listener is bound to the address that is tested, takes
whoever knows the token, and is gone after one visit."""

from __future__ import annotations

import hmac
import socket
import threading
import time
from typing import TypedDict

_ROUND_TRIPS = 20
_PIECE = bytes(2**18)
_END = b"."


class Link(TypedDict, total=False):
    """Either figures or what went wrong."""

    round_trip_s: float
    bytes_per_s: float
    error: str


def listen(address: str, token: str, within_s: float) -> int:
    """Return the port at which a thread waits for one `measure`, for `within_s` seconds. Raises OSError if the address
    is none of this host's."""
    family = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0][0]
    server = socket.socket(family, socket.SOCK_STREAM)
    server.bind((address, 0))
    server.listen(1)
    threading.Thread(target=_serve, args=(server, token.encode(), within_s), daemon=True).start()
    port: int = server.getsockname()[1]
    return port


def _serve(server: socket.socket, token: bytes, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    with server:
        while time.monotonic() < deadline:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                visitor, _ = server.accept()
                with visitor:
                    visitor.settimeout(max(0.01, deadline - time.monotonic()))
                    visitor.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    if hmac.compare_digest(_exactly(visitor, len(token)), token):
                        _answer(visitor)
                        return
            except OSError:
                continue


def _answer(visitor: socket.socket) -> None:
    """Send back single bytes, then count what comes until the visitor has sent all."""
    for _ in range(_ROUND_TRIPS):
        visitor.sendall(_exactly(visitor, 1))
    buffer = bytearray(len(_PIECE))
    while visitor.recv_into(buffer):
        pass
    visitor.sendall(_END)


def measure(address: str, port: int, token: str, seconds: float, within_s: float) -> Link:
    """Visit `listen`: the median round trip of a byte, and what one connection carries in about `seconds`."""
    stage = "cannot connect to"
    try:
        with socket.create_connection((address, port), within_s) as connection:
            stage = "lost the connection to"
            connection.settimeout(within_s)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(token.encode())
            trips = []
            for _ in range(_ROUND_TRIPS):
                started = time.perf_counter()
                connection.sendall(_END)
                _exactly(connection, 1)
                trips.append(time.perf_counter() - started)
            sent, started = 0, time.perf_counter()
            while time.perf_counter() - started < seconds:
                connection.sendall(_PIECE)
                sent += len(_PIECE)
            connection.shutdown(socket.SHUT_WR)
            _exactly(connection, 1)  # all has arrived
            took = time.perf_counter() - started
    except OSError as error:
        return Link(error=f"{stage} {address}: {error.strerror or error}")
    return Link(round_trip_s=sorted(trips)[_ROUND_TRIPS // 2], bytes_per_s=sent / took)


def _exactly(connection: socket.socket, count: int) -> bytes:
    received = b""
    while len(received) < count:
        part = connection.recv(count - len(received))
        if not part:
            raise ConnectionError("the other end has closed it")
        received += part
    return received

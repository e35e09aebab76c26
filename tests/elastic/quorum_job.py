"""Clients that vote over real sockets, in one process: a coordinator for each client, a QuorumClient for each rank."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

from deca_ds.elastic.decision import Decision
from deca_ds.elastic.quorum_client import QuorumClient
from deca_ds.elastic.quorum_server import QuorumServer
from deca_ds.launch.launcher import ClientLayout


class Job:
    """n clients of k ranks in threads; `kill` breaks a client's connections, like the end of its processes."""

    def __init__(self, clients: int, ranks: int = 1, timeout_s: float = 20.0, silence_s: float = 60.0):
        self.layout = ClientLayout(clients, ranks)
        self.servers = [
            QuorumServer(self.layout, client, "127.0.0.1", timeout_s, range(clients), silence_s)
            for client in range(clients)
        ]
        addresses = {client: each.address for client, each in enumerate(self.servers)}
        self.votes = [
            QuorumClient(rank, self.layout, addresses, timeout_s, silence_s) for rank in range(clients * ranks)
        ]

    def vote(self, bits: dict[int, int], announcement: str = "") -> dict[int, Decision | Exception]:
        def one(rank: int):
            try:
                return self.votes[rank].vote(bits[rank], f"{announcement}{rank}")
            except Exception as error:
                return error

        with ThreadPoolExecutor(len(bits)) as pool:
            return dict(zip(bits, pool.map(one, bits), strict=True))

    def end(self, client: int) -> None:
        """Like the end of its processes: connections break, nobody listens."""
        for rank in self.layout.ranks_of(client):
            votes = self.votes[rank]
            votes._do(votes._voter.heard({"kind": "out", "why": "it has ended"}, 0.0))  # it looks for nobody
            votes._line.end()
        server = self.servers[client]
        server._coordinator.retired = True  # its thread closes all


def wait_until_connected(job: Job) -> None:
    assert {decision.yes for decision in job.vote(dict.fromkeys(range(len(job.votes)), 1)).values()} == {1}


@contextmanager
def answering(*pieces: bytes) -> Iterator[tuple[tuple[str, int], list[socket.socket]]]:
    """A server that answers whatever it is sent by the same bytes, in pieces: its address, and its connections."""
    connections: list[socket.socket] = []

    def serve() -> None:
        with suppress(OSError):  # it is closed, or the other end is
            while True:
                connections.append(server.accept()[0])
                connections[-1].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connections[-1].recv(1000)
                for number, piece in enumerate(pieces):
                    time.sleep(0.1 * (number > 0))
                    connections[-1].sendall(piece)

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname(), connections
        server.shutdown(socket.SHUT_RDWR)
        for connection in connections:
            connection.close()

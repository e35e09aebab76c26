"""A rank that dies takes the other ranks of its client with it at once, whatever they wait for.

Each rank keeps a connection to its client's leader. The system closes the connections of a process that dies, and
keep-alive probes end those of a host that is gone. A rank that sees a connection end without a goodbye ends; when the
leader ends, so do all its connections. A collective alone would not suffice: NCCL keeps waiting, and a rank may be
waiting for another client.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import threading
from collections.abc import Callable

from torch.distributed import Store, TCPStore

from deca_ds.errors import KILLED, LOOK_AT_THE_KILLED, RankLostError

_KEY = "lifeline"
_GOODBYE = b"!"
_NUMBER = struct.Struct("!i")
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 2), (socket.TCP_KEEPCNT, 3))  # gone after about 11 s
_SILENT_MS = 11_000  # the same for data that the other host does not acknowledge


def keep_alive(connection: socket.socket) -> None:
    """Have the system end `connection` when the other host is silent, whether there is anything to send or not."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, seconds in _KEEPALIVE:
        connection.setsockopt(socket.IPPROTO_TCP, option, seconds)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _SILENT_MS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class Lifeline:
    """This rank's connections. All ranks of a client make one.

    store: the client's, hosted by the leader. shard: this rank's place of `ranks`. timeout_s: time for all to connect.
    lost: called by a thread, with a RankLostError, when a rank is gone. Raises OSError if one does not connect.
    """

    def __init__(self, store: Store, shard: int, ranks: int, timeout_s: float, lost: Callable[[RankLostError], None]):
        self._lost = lost
        self._peers = self._accept(store, ranks, timeout_s) if shard == 0 else self._connect(store, shard, timeout_s)
        for connection in self._peers:
            connection.settimeout(None)
            keep_alive(connection)
        threading.Thread(target=self._watch, daemon=True).start()

    def close(self) -> None:
        """Say goodbye: this rank is done."""
        for connection in self._peers:
            with contextlib.suppress(OSError):
                connection.sendall(_GOODBYE)

    @staticmethod
    def _accept(store: Store, ranks: int, timeout_s: float) -> dict[socket.socket, int]:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        with socket.create_server(("", 0), family=family, dualstack_ipv6=both) as server:
            server.settimeout(timeout_s)
            store.set(_KEY, str(server.getsockname()[1]))
            peers: dict[socket.socket, int] = {}
            while len(peers) < ranks - 1:
                connection, _ = server.accept()
                connection.settimeout(timeout_s)
                peers[connection] = _NUMBER.unpack(connection.recv(_NUMBER.size, socket.MSG_WAITALL))[0]
            return peers

    @staticmethod
    def _connect(store: Store, shard: int, timeout_s: float) -> dict[socket.socket, int]:
        assert isinstance(store, TCPStore), "a single process has no host"
        connection = socket.create_connection((store.host, int(store.get(_KEY))), timeout_s)
        connection.sendall(_NUMBER.pack(shard))
        return {connection: 0}

    def _watch(self) -> None:
        with selectors.DefaultSelector() as ready:
            for connection, shard in self._peers.items():
                ready.register(connection, selectors.EVENT_READ, shard)
            while ready.get_map():
                for key, _ in ready.select():
                    try:
                        said = key.fileobj.recv(len(_GOODBYE))  # type: ignore[union-attr]  # a socket
                    except OSError:
                        said = b""
                    ready.unregister(key.fileobj)
                    if said != _GOODBYE:
                        what = f"rank {key.data} of this client is gone, and with it the client: {KILLED}"
                        self._lost(RankLostError(what, fix=LOOK_AT_THE_KILLED))

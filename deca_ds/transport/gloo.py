"""GlooTransport: point-to-point messages over gloo, for launches without an MPI world."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from deca_ds.errors import GossipError
from deca_ds.launch.given import look_at_hosts
from deca_ds.launch.progress import Progress
from deca_ds.transport.transport import PointToPoint, lost, no_answer

_Work = tuple[str, int, dist.Work]  # direction, neighbour, work


class GlooTransport(PointToPoint):
    """A gloo group of its own over the ranks of one shard index, apart from the default world.

    store: reachable by all clients. timeout_s: longest wait for one message. connected: whether to meet the others now;
    then the constructor is collective over the clients and raises GossipError if one does not come. One client needs no
    group. GLOO_SOCKET_IFNAME picks the network interface.
    """

    def __init__(
        self, store: dist.Store, shard: int, client: int, clients: int, timeout_s: float, *, connected: bool = True
    ):
        super().__init__(client, clients)
        self.timeout_s = timeout_s
        self._group: dist.ProcessGroupGloo | None = None
        if clients > 1 and connected:
            prefixed = dist.PrefixStore(f"gossip/{shard}", store)
            self._group = self._connect(prefixed, client, clients, timedelta(seconds=timeout_s))

    def _connect(self, store: dist.Store, place: int, size: int, timeout: timedelta) -> dist.ProcessGroupGloo:
        """A group of `size` clients, in which this one is number `place`."""
        try:
            return dist.ProcessGroupGloo(store, place, size, timeout)
        except RuntimeError as error:
            raise GossipError(
                f"not all {size} clients joined the gossip group within {timeout.total_seconds():g} s: {error}",
                where=f"client {self.client}",
                fix=look_at_hosts("look at the logs of the other clients; on several networks set GLOO_SOCKET_IFNAME"),
            ) from None

    def _exchange(
        self, send: Tensor, destinations: Sequence[int], receives: Mapping[int, Tensor], tag: int
    ) -> TorchExchange:
        """See PointToPoint."""
        return TorchExchange(self, self._start(send, destinations, receives, tag), tag)

    def _start(
        self, send: Tensor, destinations: Sequence[int], receives: Mapping[int, Tensor], tag: int
    ) -> list[_Work]:
        works: list[_Work] = []
        for direction, neighbour, tensor in [
            *(("from", source, buffer) for source, buffer in receives.items()),
            *(("to", destination, send) for destination in destinations),
        ]:
            assert self._group is not None, "the transport is closed or has one client only"
            group: Any = self._group  # its types leave out what it inherits
            start = group.recv if direction == "from" else group.send
            try:
                works.append((direction, neighbour, start([tensor], self._place(neighbour), tag)))
            except RuntimeError as error:
                raise lost(self.client, neighbour, direction, tag, str(error)) from None
        self.bytes_sent += send.nbytes * len(destinations)
        return works

    def close(self) -> None:
        """See Transport."""
        self._group = None


class TorchExchange:
    """Works of one GlooTransport.exchange.

    Gloo learns that a message is through only by waiting for it, so the first `test` leaves the waiting to a thread.
    """

    def __init__(self, transport: GlooTransport, works: list[_Work], tag: int):
        self._transport = transport
        self._works = works
        self._tag = tag
        self._waiter: threading.Thread | None = None
        self._error: GossipError | None = None

    def _finish(self, progress: Progress) -> None:
        timeout_s = self._transport.timeout_s
        for direction, neighbour, work in self._works:
            progress.wait_for(neighbour)
            try:
                work.wait(timedelta(seconds=timeout_s))
            except RuntimeError as error:
                failed = (self._transport.client, neighbour, direction, self._tag)
                late = "timed out" in str(error).lower()
                self._error = no_answer(*failed, timeout_s) if late else lost(*failed, str(error))
                return
            progress.tick()
        progress.wait_for(None)

    def test(self) -> bool:
        """See Exchange. Raises GossipError if a message has failed."""
        if self._in_thread(Progress()).is_alive():  # what it waits for is not what this rank waits for
            return False
        if self._error is not None:
            raise self._error
        return True

    def _in_thread(self, progress: Progress) -> threading.Thread:
        if self._waiter is None:
            self._waiter = threading.Thread(target=self._finish, args=(progress,), daemon=True)
            self._waiter.start()
        return self._waiter

    def wait(self) -> None:
        """See Exchange."""
        if self._waiter is None:
            self._finish(self._transport.progress)
        else:
            self._waiter.join()
        if self._error is not None:
            raise self._error
        self._works = []

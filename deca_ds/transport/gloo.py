"""GlooTransport: point-to-point messages over gloo, for launches without an MPI world."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from deca_ds.errors import DisconnectedError, MessageError
from deca_ds.launch.given import look_at_hosts
from deca_ds.launch.progress import Progress
from deca_ds.transport.transport import Endpoint, Transport

_Work = tuple[str, int, dist.Work]  # direction, peer, work


class GlooTransport(Transport):
    """Messages over a gloo group of its own, which joins this rank's peers, apart from the default world.

    store: reachable by all clients. connected: whether to meet the others now; then the constructor is collective over
    the peers and raises DisconnectedError if one does not come. One client needs no group. GLOO_SOCKET_IFNAME picks
    the network interface.
    """

    def __init__(
        self,
        store: dist.Store,
        end: Endpoint,
        *,
        connected: bool = True,
    ):
        super().__init__(end)
        self._group: dist.ProcessGroupGloo | None = None
        if len(self.members) > 1 and connected:
            self._group = self._connect(self._key(store), self.peers, timedelta(seconds=self.timeout_s))

    def _key(self, store: dist.Store, number: int | None = None) -> dist.Store:
        """Return the part of the store where the peers meet. number: counts later connections; None for the first."""
        group = f"gossip/{self.layout.group_of(self.rank)}"
        return dist.PrefixStore(group if number is None else f"{group}/{number}", store)

    def _connect(self, store: dist.Store, peers: list[int], timeout: timedelta) -> dist.ProcessGroupGloo:
        """Connect the ranks `peers`, of which this rank is one, as a process group."""
        try:
            return dist.ProcessGroupGloo(store, peers.index(self.rank), len(peers), timeout)
        except RuntimeError as error:
            raise DisconnectedError(
                f"not all {len(peers)} ranks joined the gossip group within {timeout.total_seconds():g} s: {error}",
                where=self.layout.named(self.rank),
                fix=look_at_hosts("look at the output of the other ranks; on several networks set GLOO_SOCKET_IFNAME"),
            ) from None

    def _exchange(
        self, send: Tensor, destinations: Sequence[int], receives: Mapping[int, Tensor], tag: int
    ) -> TorchExchange:
        """See Transport."""
        return TorchExchange(self, self._start(send, destinations, receives, tag), tag)

    def _start(
        self, send: Tensor, destinations: Sequence[int], receives: Mapping[int, Tensor], tag: int
    ) -> list[_Work]:
        works: list[_Work] = []
        peers = self.peers
        for direction, peer, tensor in [
            *(("from", source, buffer) for source, buffer in receives.items()),
            *(("to", destination, send) for destination in destinations),
        ]:
            assert self._group is not None, "the transport is closed or has one client only"
            group: Any = self._group  # its types leave out what it inherits
            start = group.recv if direction == "from" else group.send
            try:
                works.append((direction, peer, start([tensor], peers.index(peer), tag)))
            except RuntimeError as error:
                raise self.lost(peer, direction, tag, str(error)) from None
        self.bytes_sent += send.nbytes * len(destinations)
        return works

    def close(self) -> None:
        """See Transport."""
        self._group = None


class TorchExchange:
    """The works of one GlooTransport.exchange, which are messages under way.

    Gloo learns that a message is through only by waiting for it, so the first `test` leaves the waiting to a thread.
    """

    def __init__(self, transport: GlooTransport, works: list[_Work], tag: int):
        self._transport = transport
        self._works = works
        self._tag = tag
        self._waiter: threading.Thread | None = None
        self._error: MessageError | None = None

    def _finish(self, progress: Progress) -> None:
        transport = self._transport
        for direction, peer, work in self._works:
            progress.wait_for(transport.layout.client_of(peer))
            try:
                work.wait(timedelta(seconds=transport.timeout_s))
            except RuntimeError as error:
                failed = (peer, direction, self._tag)
                late = "timed out" in str(error).lower()
                self._error = transport.no_answer(*failed) if late else transport.lost(*failed, str(error))
                return
            progress.tick()
        progress.wait_for(None)

    def test(self) -> bool:
        """See Exchange. Raises MessageError if a message has failed."""
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

"""LocalTransport: ranks that are threads of one process, for tests and benchmarks."""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence

from torch import Tensor

from deca_ds.launch import ClientLayout
from deca_ds.transport.transport import Endpoint, Transport


class LocalNetwork:
    """Mailboxes between all ranks. sizes: number of ranks of each client, or the number of clients of one rank.
    timeout_s: how long a receiver waits."""

    def __init__(self, sizes: int | Sequence[int], timeout_s: float = 60.0):
        self.layout = ClientLayout.of([1] * sizes if isinstance(sizes, int) else sizes)
        self.timeout_s = timeout_s
        self.arrived = threading.Condition()
        self.mailboxes: dict[tuple[int, int, int], _Mailbox] = defaultdict(_Mailbox)  # (source, destination, tag)

    def transport(self, rank: int) -> LocalTransport:
        """Make the transport of one rank."""
        return LocalTransport(self, rank)


class _Receive:
    """A message that a rank expects. message: None until it has arrived."""

    def __init__(self) -> None:
        self.message: Tensor | None = None


class _Mailbox:
    """Delivers messages of one source, destination and tag to the receives, in the order of both. messages: those that
    no receive expects yet."""

    def __init__(self) -> None:
        self.messages: deque[Tensor] = deque()
        self._expected: deque[_Receive] = deque()

    def put(self, message: Tensor) -> None:
        """Deliver a message to the next receive."""
        self.messages.append(message)
        self._match()

    def expect(self) -> _Receive:
        """Make a receive for the next message."""
        receive = _Receive()
        self._expected.append(receive)
        self._match()
        return receive

    def _match(self) -> None:
        while self.messages and self._expected:
            self._expected.popleft().message = self.messages.popleft()


class LocalTransport(Transport):
    """Messages over a LocalNetwork. A sent tensor is copied at once, so that sending never waits."""

    def __init__(self, network: LocalNetwork, rank: int):
        super().__init__(Endpoint(network.layout, rank, network.timeout_s))
        self.network = network

    def _exchange(
        self, send: Tensor, destinations: Sequence[int], receives: Mapping[int, Tensor], tag: int
    ) -> LocalExchange:
        """See Transport."""
        mailboxes = self.network.mailboxes
        with self.network.arrived:
            for j in destinations:
                mailboxes[self.rank, j, tag].put(send.clone())
                self.bytes_sent += send.nbytes
            self.network.arrived.notify_all()
            expected = {j: (mailboxes[j, self.rank, tag].expect(), buffer) for j, buffer in receives.items()}
        return LocalExchange(self.network, self, expected, tag)

    def close(self) -> None:
        """See Transport."""


class LocalExchange:
    """The receives of one LocalTransport.exchange that are still to come, each with its buffer."""

    def __init__(
        self,
        network: LocalNetwork,
        transport: LocalTransport,
        expected: dict[int, tuple[_Receive, Tensor]],
        tag: int,
    ):
        self.network = network
        self._transport = transport
        self._expected = expected
        self._tag = tag

    def _take(self, source: int) -> bool:
        """Move source's message into its buffer if it is there. The caller holds the lock."""
        receive, buffer = self._expected[source]
        if receive.message is None:
            return False
        message = receive.message
        del self._expected[source]
        if (message.shape, message.dtype) != (buffer.shape, buffer.dtype):
            got, expected = (f"{tuple(each.shape)} {each.dtype}" for each in (message, buffer))
            raise self._transport.misfit(source, self._tag, got, expected)
        buffer.copy_(message)
        return True

    def test(self) -> bool:
        """See Exchange."""
        with self.network.arrived:
            return all([self._take(source) for source in list(self._expected)])

    def wait(self) -> None:
        """See Exchange."""
        deadline = time.monotonic() + self._transport.timeout_s
        with self.network.arrived:
            for source in list(self._expected):
                self._transport.note_wait(source)
                while not self._take(source):
                    if not self.network.arrived.wait(max(0.0, deadline - time.monotonic())):
                        raise self._transport.no_answer(source, "from", self._tag)
        self._transport.progress.wait_for(None)

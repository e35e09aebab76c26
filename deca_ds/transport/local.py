"""LocalTransport: clients that are threads of one process, for tests and simulation."""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence

from torch import Tensor

from deca_ds.transport.transport import PointToPoint, lost, no_answer


class LocalNetwork:
    """Mailboxes between n clients. timeout_s: how long a receiver waits."""

    def __init__(self, clients: int, timeout_s: float = 60.0):
        self.clients = clients
        self.timeout_s = timeout_s
        self.arrived = threading.Condition()
        self.mailboxes: dict[tuple[int, int, int], _Mailbox] = defaultdict(_Mailbox)  # (source, destination, tag)

    def transport(self, client: int) -> LocalTransport:
        """The end of one client."""
        return LocalTransport(self, client)


class _Receive:
    """A message that is expected; None until it is there."""

    def __init__(self) -> None:
        self.message: Tensor | None = None


class _Mailbox:
    """Messages of one source, destination and tag go to those who expect them, in the order of both. messages: those
    that nobody expects yet."""

    def __init__(self) -> None:
        self.messages: deque[Tensor] = deque()
        self._expected: deque[_Receive] = deque()

    def put(self, message: Tensor) -> None:
        self.messages.append(message)
        self._match()

    def expect(self) -> _Receive:
        receive = _Receive()
        self._expected.append(receive)
        self._match()
        return receive

    def _match(self) -> None:
        while self.messages and self._expected:
            self._expected.popleft().message = self.messages.popleft()


class LocalTransport(PointToPoint):
    """A sent tensor is copied at once, so that sending never waits."""

    def __init__(self, network: LocalNetwork, client: int):
        super().__init__(client, network.clients)
        self._network = network

    def _exchange(
        self, send: Tensor, destinations: Sequence[int], receives: Mapping[int, Tensor], tag: int
    ) -> LocalExchange:
        """See PointToPoint."""
        mailboxes = self._network.mailboxes
        with self._network.arrived:
            for j in destinations:
                mailboxes[self.client, j, tag].put(send.clone())
                self.bytes_sent += send.nbytes
            self._network.arrived.notify_all()
            expected = {j: (mailboxes[j, self.client, tag].expect(), buffer) for j, buffer in receives.items()}
        return LocalExchange(self._network, self.client, expected, tag)

    def close(self) -> None:
        """See Transport."""


class LocalExchange:
    """Receives still to come of one LocalTransport.exchange, each with its buffer."""

    def __init__(self, network: LocalNetwork, client: int, expected: dict[int, tuple[_Receive, Tensor]], tag: int):
        self._network = network
        self._client = client
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
            cause = f"got {tuple(message.shape)} {message.dtype}, expected {tuple(buffer.shape)} {buffer.dtype}"
            raise lost(self._client, source, "from", self._tag, cause)
        buffer.copy_(message)
        return True

    def test(self) -> bool:
        """See Exchange."""
        with self._network.arrived:
            return all([self._take(source) for source in list(self._expected)])

    def wait(self) -> None:
        """See Exchange."""
        timeout_s = self._network.timeout_s
        deadline = time.monotonic() + timeout_s
        with self._network.arrived:
            for source in list(self._expected):
                while not self._take(source):
                    if not self._network.arrived.wait(max(0.0, deadline - time.monotonic())):
                        raise no_answer(self._client, source, "from", self._tag, timeout_s)

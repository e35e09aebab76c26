"""The interface of a transport: messages between job ranks of different clients.

A transport moves bytes. It knows the client of each rank only to name it in errors and in the note of what this rank
waits for. It knows nothing of mixing: routes.py says who exchanges what with whom.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from deca_ds.errors import KILLED, LOOK_AT_THE_KILLED, ConnectionLostError, MessageError
from deca_ds.launch import ClientLayout
from deca_ds.launch.progress import Progress
from deca_ds.launch.view import Membership, View
from deca_ds.transport.checksums import CheckedExchange, Exchange
from deca_ds.transport.routes import Routes

# Tags fit MPI's guaranteed range 0..32767. On every transport, messages of one source and tag arrive in the order in
# which they were sent, so it is safe to reuse tags. They let an error name the message that was waited for.
_CHUNK_TAGS = 4096
_STEP_TAGS = 7
REDUCE_TAG, GATHER_TAG, BARRIER_TAG, PROBE_TAG, HANDOVER_TAG = (_STEP_TAGS * _CHUNK_TAGS + k for k in range(5))


def chunk_tag(t: int, chunk: int) -> int:
    """Return the tag of message number `chunk` in averaging t."""
    return (t % _STEP_TAGS) * _CHUNK_TAGS + chunk % _CHUNK_TAGS


@dataclass(frozen=True)
class Endpoint:
    """One rank's end of the network between clients, whatever carries the messages.

    layout, rank: which rank this is, and of which client. timeout_s: longest wait for one message, in seconds.
    membership: the clients in the job; None: all, always. progress: what this rank is doing; every wait notes the
    client that it waits for. checksums: whether messages carry checksums (checksums.py); the same for all ranks.
    """

    layout: ClientLayout
    rank: int
    timeout_s: float
    membership: Membership | None = None
    progress: Progress | None = None
    checksums: bool = False


class Transport(ABC):
    """Carries the messages of one rank, to and from the ranks of its group (ClientLayout.group_of) whose clients are in
    the job.

    epoch: how often the connections have been made anew. bytes_sent: bytes that this rank has sent so far.
    """

    def __init__(self, end: Endpoint):
        layout = end.layout
        self.layout, self.rank, self.timeout_s = layout, end.rank, end.timeout_s
        self.client, self.clients = layout.client_of(end.rank), layout.clients
        self.routes = Routes(layout, end.rank)
        self.membership = Membership(View.of_all(layout.clients)) if end.membership is None else end.membership
        self.epoch = 0
        self.bytes_sent = 0
        self.progress = end.progress or Progress()
        self.checksums = end.checksums

    def exchange(self, send: Tensor, destinations: Sequence[int], receives: Mapping[int, Tensor], tag: int) -> Exchange:
        """Start sending `send` to each rank of `destinations` and receiving from each source rank into its buffer.

        Tensors are contiguous, on the CPU, of any dtype; a message is as long as its buffer. Do not touch any of them
        before `wait` has returned. Waiting raises MessageError if a message is lost, damaged or of another length.
        """
        if self.checksums and (destinations or receives):
            return CheckedExchange(self._exchange, self.layout, self.rank, send, destinations, receives, tag)
        return self._exchange(send, destinations, receives, tag)

    @abstractmethod
    def _exchange(
        self, send: Tensor, destinations: Sequence[int], receives: Mapping[int, Tensor], tag: int
    ) -> Exchange:
        """See `exchange`; without checksums."""

    @property
    def members(self) -> View:
        """The clients in the job, which the collectives join."""
        return self.membership.view

    @property
    def peers(self) -> list[int]:
        """The ranks that the connections join, including this one, in the order of the group."""
        return self.routes.peers(self.members.clients)

    def note_wait(self, peer: int) -> None:
        """Note that this rank waits for the client of rank `peer`."""
        self.progress.wait_for(self.layout.client_of(peer))

    @abstractmethod
    def close(self) -> None:
        """Close the connections. May be called twice."""

    def no_answer(self, peer: int, direction: str, tag: int) -> MessageError:
        """Make the error for a message that did not get through. direction: "from" or "to" the peer."""
        return MessageError(
            f"no message {direction} {self.layout.named(peer)} within {self.timeout_s:g} s (tag {tag})",
            where=self.layout.named(self.rank),
            fix=f"look at the log of {self.layout.named(peer)}; if it is only slow, raise cluster.timeout_s",
        )

    def lost(self, peer: int, direction: str, tag: int, seen: str) -> ConnectionLostError:
        """Make the error for a connection that broke. seen: what the library says."""
        return ConnectionLostError(
            f"{self.layout.named(peer)} is gone: {KILLED}",
            where=f"{self.layout.named(self.rank)}, {self.progress.place}: a message {direction} it (tag {tag})",
            fix=LOOK_AT_THE_KILLED,
            rank=peer,
            seen=" ".join(seen.split()),
        )

    def misfit(self, peer: int, tag: int, got: str, expected: str) -> MessageError:
        """Make the error for a message that does not fit its buffer."""
        return MessageError(
            f"a message from {self.layout.named(peer)} does not fit (tag {tag}): got {got}, expected {expected}",
            where=self.layout.named(self.rank),
            fix=f"look at the output of {self.layout.named(peer)}: it runs another configuration",
        )

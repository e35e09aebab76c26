"""What a transport is: messages between job ranks of different clients.

A transport moves bytes. It knows of which client each rank is, to say so in errors and in what this rank waits for, and
nothing of mixing: routes.py says who exchanges what with whom.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor

from deca_ds.errors import MessageError
from deca_ds.launch.launcher import ClientLayout
from deca_ds.launch.progress import Progress
from deca_ds.launch.view import Membership, View
from deca_ds.transport.checksums import CheckedExchange, Exchange
from deca_ds.transport.routes import Routes

# Tags fit MPI's guaranteed range 0..32767. Messages of one source and tag arrive in the order in which they were sent,
# on every transport, so a tag that comes round again is harmless. Tags let an error name what was waited for.
_CHUNK_TAGS = 4096
_STEP_TAGS = 7
REDUCE_TAG, GATHER_TAG, BARRIER_TAG, PROBE_TAG, HANDOVER_TAG = (_STEP_TAGS * _CHUNK_TAGS + k for k in range(5))


def chunk_tag(t: int, chunk: int) -> int:
    """Tag of message number `chunk` in averaging t."""
    return (t % _STEP_TAGS) * _CHUNK_TAGS + chunk % _CHUNK_TAGS


class Transport(ABC):
    """One rank's end of the network between clients.

    layout, rank: which rank this is, and of which client. membership: who is in; `exchange` reaches their
    ranks of this one's group (ClientLayout.group_of). epoch: how often the connections have been made anew. bytes_sent:
    what this rank has handed to the network so far. progress: what this rank is doing; waits note for which client they
    are. checksums: whether messages carry checksums (checksums.py); the same for all ranks.
    """

    def __init__(
        self,
        layout: ClientLayout,
        rank: int,
        membership: Membership | None = None,
        progress: Progress | None = None,
        checksums: bool = False,
    ):
        self.layout, self.rank = layout, rank
        self.client, self.clients = layout.client_of(rank), layout.clients
        self.routes = Routes(layout, rank)
        self.membership = Membership(View.of_all(layout.clients)) if membership is None else membership
        self.epoch = 0
        self.bytes_sent = 0
        self.progress = progress or Progress()
        self.checksums = checksums

    def exchange(self, send: Tensor, destinations: Sequence[int], receives: Mapping[int, Tensor], tag: int) -> Exchange:
        """Start sending `send` to each rank of `destinations` and receiving from each source rank into its buffer.

        Contiguous CPU tensors of any dtype; a message is as long as its buffer. Neither may be touched before `wait`.
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
        """Those that are in; the collectives join these."""
        return self.membership.view

    @property
    def peers(self) -> list[int]:
        """The ranks that the connections join, this one too, in their order there."""
        return self.routes.peers(self.members.clients)

    def note_wait(self, peer: int) -> None:
        """Note that this rank waits for that one's client."""
        self.progress.wait_for(self.layout.client_of(peer))

    @abstractmethod
    def close(self) -> None:
        """Give the connections back. May be called twice."""

    def no_answer(self, peer: int, direction: str, tag: int, timeout_s: float) -> MessageError:
        """The error of a message that did not get through. direction: "from" or "to" the peer."""
        return MessageError(
            f"no message {direction} {self.layout.named(peer)} within {timeout_s:g} s (tag {tag})",
            where=self.layout.named(self.rank),
            fix=f"look at the log of {self.layout.named(peer)}; if it is only slow, raise cluster.timeout_s",
        )

    def lost(self, peer: int, direction: str, tag: int, cause: str) -> MessageError:
        """The error of a connection that broke, or of a message that does not fit its buffer."""
        return MessageError(
            f"a message {direction} {self.layout.named(peer)} failed (tag {tag}): {cause}",
            where=self.layout.named(self.rank),
            fix=f"look at the end of the output of {self.layout.named(peer)}: it was killed (dmesg tells of the "
            "out-of-memory killer), its host is out of reach, or it runs another configuration",
        )

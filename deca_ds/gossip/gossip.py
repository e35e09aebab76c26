"""Gossip: the weighted mean x_i <- sum_j W_ij x_j of flat float32 shards, chunk by chunk.

    averaging = begin(gossip, t)
    for chunk in gossip.chunks(numels):
        local step on shard[chunk.part]
        absorb(averaging.send(chunk, "theta", shard[chunk.part]))
    absorb(averaging.settle())

Chunks travel while later ones are computed. A strategy decides in which steps an averaging proceeds (strategies.py):
windowed, or whole, because its weights, late neighbours or a commit concern all chunks together. A codec decides what
goes over the wire (codec.py). A damaged message is not averaged, and a mean is handed on only if all values that it is
made of are finite.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from deca_ds.errors import GossipError
from deca_ds.gossip.buffers import BufferPool, Outputs
from deca_ds.gossip.clip import Clip
from deca_ds.gossip.codec import CODECS, Codec
from deca_ds.gossip.late_exchange import LateExchange
from deca_ds.gossip.schedule import MixingSchedule
from deca_ds.gossip.skip_log import SkipLog
from deca_ds.transport import Chunk, Commit, Transport


def chunk_elements(chunk_mib: float) -> int:
    """Return the most float32 elements of a chunk. chunk_mib: gossip.chunk_mib."""
    return max(1, int(chunk_mib * 2**20) // 4)


class Gossip:
    """Mixes this rank's shards with what the ranks of neighbouring clients hold of the same parameters.

    chunk_mib: gossip.chunk_mib. device: where the shards live; those on a GPU travel through page-locked host memory.
    codec: how values are sent. commit: makes an averaging count for all survivors, if clients may die. late:
    leaves out late neighbours, if that is configured; not together with such a commit. clip: clips neighbours, if that
    is configured. client_sum: sums a number over the client's ranks. reports: whether this rank prints on stderr who
    was late.

    skip_log: which neighbours were left out. wait_seconds: time spent waiting for messages so far. bytes_sent: bytes of
    parameters that this rank has sent to neighbours. Raises GossipError if the schedule is for another number of
    clients than the transport joins.
    """

    def __init__(
        self,
        transport: Transport,
        schedule: MixingSchedule,
        chunk_mib: float = 4.0,
        device: torch.device | str = "cpu",
        *,
        codec: Codec = CODECS["float32"],
        commit: Commit | None = None,
        clip: Clip | None = None,
        late: LateExchange | None = None,
        client_sum: Callable[[float], float] = float,
        reports: bool = False,
    ):
        if schedule.size != transport.clients:
            raise GossipError(
                f"the mixing schedule is for {schedule.size} clients, but {transport.clients} are connected",
                where=f"client {transport.client}",
                fix="start as many clients as cluster.clients says",
            )
        self.transport = transport
        self.schedule = schedule
        self.device = torch.device(device)
        self.codec = codec
        self.commit = commit or Commit()
        self.wait_seconds, self.bytes_sent = 0.0, 0
        self.pool = BufferPool(codec.dtype, pinned=self.device.type == "cuda")
        self.outputs = Outputs(self.device)
        self.skip_log = SkipLog(transport, client_sum, reports)
        self.clip, self.late = clip, late
        self._chunk_elements = chunk_elements(chunk_mib)
        self._chunks: dict[tuple[int, ...], list[Chunk]] = {}  # by block, as far as they have been needed

    def average_by(self, schedule: MixingSchedule) -> None:
        """Use this schedule from now on; an averaging that is repeated uses it from its next attempt."""
        self.schedule = schedule

    def has_neighbours(self, t: int) -> bool:
        """Return whether averaging t joins this client with any other."""
        client = self.transport.client
        return bool(self.schedule.sources(client, t) or self.schedule.destinations(client, t))

    def chunks(self, numels: Sequence[int]) -> list[Chunk]:
        """Return the chunks of a block: consecutive parts of this rank's shard of at most chunk_mib each. If clients
        differ in size, parts may be empty. numels: elements of each of the block's parameters, in the order of the
        shard."""
        block = tuple(numels)
        if block not in self._chunks:
            self._chunks[block] = self.transport.routes.chunks(block, self._chunk_elements)
        return self._chunks[block]

    def drain(self) -> None:
        """Wait for messages that no averaging waits for any more. All clients call this before they disconnect."""
        if self.late is not None:
            self.late.drain()

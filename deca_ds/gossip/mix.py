"""Gossip: the weighted mean x_i <- sum_j W_ij x_j of flat float32 shards, chunk by chunk.

    for c, chunk in enumerate(gossip.chunks(shard.numel())):
        local step on shard[chunk]
        pending.append(gossip.start(t, shard[chunk], c))
        if len(pending) == window: absorb(pending.pop(0).wait())
    for mix in pending: absorb(mix.wait())

Chunks travel while later ones are computed. At most `window` of them are under way, so receive buffers take at most
window * degree * chunk_mib, and they are used again. With clipping (clip.py) there is no window: the mean of any chunk
takes the distance over all of them.

Nothing is averaged before it is checked: that it is of this averaging, and that all its values are finite.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from deca_ds.errors import GossipError
from deca_ds.gossip.clip import clipped_weights
from deca_ds.gossip.schedule import MixingSchedule
from deca_ds.gossip.transport import Exchange, Transport, chunk_tag

_WINDOW = 4  # messages on their way at a time: bounds the receive buffers


class BufferPool:
    """Flat float32 CPU buffers, used again; page-locked if `pinned`, as copies to and from a GPU want them."""

    def __init__(self, pinned: bool):
        self._pinned = pinned
        self._free: list[Tensor] = []  # ascending by size

    def take(self, numel: int) -> Tensor:
        """A buffer of at least `numel` elements: the smallest free one, or a new one in place of a smaller."""
        for place, buffer in enumerate(self._free):
            if buffer.numel() >= numel:
                return self._free.pop(place)
        if self._free:
            self._free.pop(0)
        return torch.empty(numel, dtype=torch.float32, pin_memory=self._pinned)

    def give_back(self, buffer: Tensor) -> None:
        """Make a taken buffer free again."""
        self._free.append(buffer)
        self._free.sort(key=Tensor.numel)


class Gossip:
    """Mixes this rank's shards with those of the same index in neighbouring clients.

    chunk_mib: gossip.chunk_mib. device: where the shards live; those on a GPU travel by way of page-locked host memory.
    clip_radius: gossip.clip_radius; client_sum: then, the sum of a number over the client's ranks. window: how many
    chunks may be under way.
    wait_seconds: time spent in PendingMix.wait for messages so far. bytes_sent: parameters that this
    rank has sent to neighbours so far. Raises GossipError if the schedule is for another number of clients than the
    transport joins.
    """

    def __init__(
        self,
        transport: Transport,
        schedule: MixingSchedule,
        chunk_mib: float = 16.0,
        device: torch.device | str = "cpu",
        *,
        clip_radius: float | None = None,
        client_sum: Callable[[float], float] = float,
    ):
        if schedule.size != transport.clients:
            raise GossipError(
                f"the mixing schedule is for {schedule.size} clients, but {transport.clients} are connected",
                where=f"client {transport.client}",
                fix="start as many clients as cluster.clients says",
            )
        self.transport = transport
        self.schedule = schedule
        self.wait_seconds = 0.0
        self.bytes_sent = 0
        self.device = torch.device(device)
        self.pool = BufferPool(pinned=self.device.type == "cuda")
        self.clip_radius = clip_radius
        self.window = _WINDOW if clip_radius is None else math.inf
        self._client_sum = client_sum
        self._unclipped: list[PendingMix] = []  # of the averaging under way, all chunks so far
        self._chunk_elements = max(1, int(chunk_mib * 2**20) // 4)
        self._mixed = torch.empty(0, dtype=torch.float32, device=self.device)

    def has_neighbours(self, t: int) -> bool:
        """Whether averaging t joins this client with any other."""
        client = self.transport.client
        return bool(self.schedule.sources(client, t) or self.schedule.destinations(client, t))

    def chunks(self, numel: int) -> list[slice]:
        """A shard of `numel` elements as consecutive slices of at most chunk_mib each."""
        step = self._chunk_elements
        return [slice(a, min(a + step, numel)) for a in range(0, numel, step)]

    def start(self, t: int, x: Tensor, chunk: int = 0) -> PendingMix:
        """Start averaging t for `x`, flat float32 on `device`: chunk number `chunk` of the shard.

        All clients start the same chunks of the same sizes. `x` must not change before `wait` has returned. On a GPU
        the call waits until `x` is computed and copied to the host, but not for any message.
        """
        if x.dim() != 1 or x.dtype != torch.float32 or x.device.type != self.device.type or not x.is_contiguous():
            raise ValueError(
                f"expected a flat float32 tensor on {self.device}, got {x.dtype} {tuple(x.shape)} on {x.device}"
            )
        client = self.transport.client
        sources, destinations = self.schedule.sources(client, t), self.schedule.destinations(client, t)
        if not sources and not destinations:
            return PendingMix(self, t, x, None, {}, None)
        self.transport.progress.enter("gossip")
        buffers = {j: self.pool.take(x.numel()) for j in sources}
        staged = None
        if x.device.type == "cuda":
            staged = self.pool.take(x.numel())
            staged[: x.numel()].copy_(x)  # synchronous: the network reads host memory
        receives = {j: buffer[: x.numel()] for j, buffer in buffers.items()}
        send = x.detach() if staged is None else staged[: x.numel()]
        self.bytes_sent += send.nbytes * len(destinations)
        exchange = self.transport.exchange(send, destinations, receives, chunk_tag(t, chunk))
        pending = PendingMix(self, t, x, exchange, buffers, staged)
        if self.clip_radius is not None:
            self._unclipped.append(pending)
        return pending

    def clip(self, t: int) -> None:
        """Receive all chunks of averaging t and give them the weights that clip, if there is anything to clip.

        All ranks of a client call this when they have started all chunks, also those whose shard is empty.
        """
        if self.clip_radius is None:
            return
        client, (chunks, self._unclipped) = self.transport.client, (self._unclipped, [])
        for pending in chunks:
            pending.receive()
        sources = self.schedule.sources(client, t)
        distances = {
            j: self._client_sum(sum(pending.squared_distance(j) for pending in chunks)) ** 0.5 for j in sources
        }
        for j, distance in distances.items():
            if not math.isfinite(distance):
                raise refusal(self, t, f"the block of client {j} is not at a finite distance", j)
        row = {j: self.schedule.weight(client, j, t) for j in (*sources, client)}
        for pending in chunks:
            pending.weights = clipped_weights(row, client, distances, self.clip_radius)

    def output(self, numel: int) -> Tensor:
        """The buffer of mixed values, (numel,), on `device`; there is one."""
        if self._mixed.numel() < numel:
            self._mixed = torch.empty(numel, dtype=torch.float32, device=self.device)
        return self._mixed[:numel]


class PendingMix:
    """One chunk under way. Made by Gossip.start.

    terms: what each source sends, by client, valid after `receive`. weights: j -> w_ij, this client's too.
    """

    def __init__(
        self,
        gossip: Gossip,
        t: int,
        x: Tensor,
        exchange: Exchange | None,
        buffers: dict[int, Tensor],
        staged: Tensor | None,
    ):
        self._gossip = gossip
        self._t = t
        self._x = x
        self._exchange = exchange  # None: nobody to talk to
        self._buffers = buffers
        self._staged = staged
        self._received = False
        self._waited = False
        client = gossip.transport.client
        self.terms = {j: buffer[: x.numel()] for j, buffer in buffers.items()}
        self.weights = {j: gossip.schedule.weight(client, j, t) for j in (*buffers, client)}

    def wait(self) -> Tensor:
        """sum_j W_ij x_j, float32, on the device of x; call it once. With clipping, x_j as clip.py makes it.

        Terms are added in ascending client order, the own one in its place, so that the result does not depend on the
        transport. It is valid until the next `wait` of the same Gossip. With nobody to talk to it is x itself. Raises
        GossipError if a neighbour does not answer or has sent a value that is not finite, naming it; then nothing has
        been averaged.
        """
        assert not self._waited, "a PendingMix is waited for once"
        self._waited = True
        if self._exchange is None:
            return self._x
        gossip, client = self._gossip, self._gossip.transport.client
        assert self not in gossip._unclipped, "Gossip.clip comes before"
        self.receive()
        mixed = gossip.output(self._x.numel())
        terms = self.terms | {client: self._x.detach()}
        for place, j in enumerate(sorted(j for j in terms if self.weights[j] > 0)):
            term = terms[j].to(mixed.device, non_blocking=True)
            if place == 0:
                torch.mul(term, self.weights[j], out=mixed)
            else:
                mixed.add_(term, alpha=self.weights[j])
        if mixed.device.type == "cuda":
            torch.cuda.current_stream(mixed.device).synchronize()  # the copies have left their buffers
        for buffer in (*self._buffers.values(), *([] if self._staged is None else [self._staged])):
            gossip.pool.give_back(buffer)
        return mixed

    def receive(self) -> None:
        """Wait for the messages and check them; does nothing the second time. Raises GossipError, see `wait`."""
        if self._received or self._exchange is None:
            return
        self._received = True
        started = time.perf_counter()
        self._exchange.wait()
        self._gossip.wait_seconds += time.perf_counter() - started
        self._gossip.transport.progress.tick()
        for j, term in (*self.terms.items(), (self._gossip.transport.client, self._x.detach())):
            # a sum is a cheap check; only one that is not finite, which large values make too, needs the exact one
            bad = 0 if bool(term.sum().isfinite()) else int(term.numel() - term.isfinite().sum())
            if bad:
                raise refusal(self._gossip, self._t, f"{bad} of {term.numel()} values of client {j} are not finite", j)

    def squared_distance(self, j: int) -> float:
        """|x_j - x_i|^2 of this chunk."""
        difference = self.terms[j].to(self._x.device) - self._x.detach()
        square = float(torch.dot(difference, difference))
        return (
            square if math.isfinite(square) else float(torch.linalg.vector_norm(difference, dtype=torch.float64)) ** 2
        )


def refusal(gossip: Gossip, t: int, what: str, j: int) -> GossipError:
    """The error of a message of client j that must not be averaged."""
    return GossipError(
        f"{what} (averaging {t})",
        where=f"client {gossip.transport.client}, {gossip.transport.progress.place}",
        fix=f"the training of client {j} has diverged: lower optimizer.lr or look at its data",
    )

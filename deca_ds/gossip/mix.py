"""Gossip: the weighted mean x_i <- sum_j W_ij x_j of flat float32 shards, chunk by chunk.

    for c, chunk in enumerate(gossip.chunks(shard.numel())):
        local step on shard[chunk]
        pending.append(gossip.start(t, shard[chunk], c))
        if len(pending) == window: absorb(pending.pop(0).wait())
    for mix in pending: absorb(mix.wait())

Chunks travel while later ones are computed. At most `window` of them are under way, so receive buffers take at most
window * degree * chunk_mib, and they are used again.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from deca_ds.errors import GossipError
from deca_ds.gossip.schedule import MixingSchedule
from deca_ds.gossip.transport import Exchange, Transport, chunk_tag


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
        buffers = {j: self.pool.take(x.numel()) for j in sources}
        staged = None
        if x.device.type == "cuda":
            staged = self.pool.take(x.numel())
            staged[: x.numel()].copy_(x)  # synchronous: the network reads host memory
        receives = {j: buffer[: x.numel()] for j, buffer in buffers.items()}
        send = x.detach() if staged is None else staged[: x.numel()]
        self.bytes_sent += send.nbytes * len(destinations)
        exchange = self.transport.exchange(send, destinations, receives, chunk_tag(t, chunk))
        return PendingMix(self, t, x, exchange, buffers, staged)

    def output(self, numel: int) -> Tensor:
        """The buffer of mixed values, (numel,), on `device`; there is one."""
        if self._mixed.numel() < numel:
            self._mixed = torch.empty(numel, dtype=torch.float32, device=self.device)
        return self._mixed[:numel]


class PendingMix:
    """One chunk under way. Made by Gossip.start."""

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
        self._waited = False

    def wait(self) -> Tensor:
        """sum_j W_ij x_j, float32, on the device of x; call it once.

        Terms are added in ascending client order, the own one in its place, so that the result does not depend on the
        transport. It is valid until the next `wait` of the same Gossip. With nobody to talk to it is x itself. Raises
        GossipError if a neighbour does not answer or has sent a value that is not finite, naming it.
        """
        assert not self._waited, "a PendingMix is waited for once"
        self._waited = True
        if self._exchange is None:
            return self._x
        gossip, client, numel = self._gossip, self._gossip.transport.client, self._x.numel()
        started = time.perf_counter()
        self._exchange.wait()
        gossip.wait_seconds += time.perf_counter() - started

        mixed = gossip.output(numel)
        terms = {j: buffer[:numel] for j, buffer in self._buffers.items()}
        if gossip.schedule.weight(client, client, self._t) > 0:
            terms[client] = self._x.detach()
        for place, j in enumerate(sorted(terms)):
            term, weight = terms[j].to(mixed.device, non_blocking=True), gossip.schedule.weight(client, j, self._t)
            if place == 0:
                torch.mul(term, weight, out=mixed)
            else:
                mixed.add_(term, alpha=weight)
        # A value that is not finite stays so in every later sum, so one pass over the result is enough. Asking for the
        # answer also waits for the copies to the GPU, after which the buffers are free.
        if not bool(mixed.sum().isfinite()):
            self._refuse_non_finite(terms)
        for buffer in (*self._buffers.values(), *([] if self._staged is None else [self._staged])):
            gossip.pool.give_back(buffer)
        return mixed

    def _refuse_non_finite(self, terms: dict[int, Tensor]) -> None:
        """Raise GossipError that names whose values are not finite; none are if only the check's sum overflowed."""
        client = self._gossip.transport.client
        for j, term in terms.items():
            bad = int(term.numel() - term.isfinite().sum())
            if bad:
                raise GossipError(
                    f"{bad} of {term.numel()} values of client {j} are not finite (averaging {self._t})",
                    where=f"client {client}",
                    fix=f"the training of client {j} has diverged: lower optimizer.lr or look at its data",
                )

"""MpiTransport: point-to-point messages on an MPI sub-communicator (mpi4py), buffers and never pickles."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor

from deca_ds.errors import DisconnectedError, MessageError
from deca_ds.transport.polling import poll
from deca_ds.transport.transport import Endpoint, Transport

if TYPE_CHECKING:
    from mpi4py import MPI

MESSAGE_BYTES = 2**30  # of one MPI message; counts of 2^31 and more break many MPI libraries, so longer ones are cut


def _parts(tensor: Tensor) -> list[np.ndarray]:
    """Return the memory of a contiguous CPU tensor as bytes (NumPy has no bfloat16), in parts of at most
    MESSAGE_BYTES."""
    memory = tensor.view(-1).view(torch.uint8).numpy()
    return [memory[a : a + MESSAGE_BYTES] for a in range(0, max(1, memory.nbytes), MESSAGE_BYTES)]


_Request: TypeAlias = "tuple[str, int, MPI.Request, np.ndarray]"  # direction, peer, MPI's handle, memory


class MpiTransport(Transport):
    """Messages over a duplicate of `comm`, whose ranks are this rank's peers in their order.

    The constructor is collective over `comm`; it raises DisconnectedError if a rank does not come.
    """

    def __init__(self, comm: MPI.Comm, end: Endpoint):
        from mpi4py import MPI  # starts MPI, so not on import of the package

        super().__init__(end)
        self._comm: MPI.Comm | None = self.duplicate(comm, end.timeout_s)
        self._mpi = MPI
        self._abandoned: list[_Request] = []  # they still belong to MPI, so their memory has to stay

    @staticmethod
    def duplicate(comm: MPI.Comm, timeout_s: float) -> MPI.Comm:
        """Make a communicator over the same ranks that is not shared, and whose failures are Python exceptions. Raises
        DisconnectedError unless all ranks do so within `timeout_s`."""
        from mpi4py import MPI

        duplicate, request = comm.Idup()
        if not poll(request.Test, time.monotonic() + timeout_s):
            raise DisconnectedError(
                f"not all {comm.Get_size()} ranks set up their gossip communicator within {timeout_s:g} s",
                where=f"rank {comm.Get_rank()} of them",
                fix="look at the logs of the other clients; if they are only slow, raise cluster.timeout_s",
            )
        duplicate.Set_errhandler(MPI.ERRORS_RETURN)
        return duplicate

    def _exchange(
        self, send: Tensor, destinations: Sequence[int], receives: Mapping[int, Tensor], tag: int
    ) -> MpiExchange:
        """See Transport."""
        assert self._comm is not None, "the transport is closed"
        # Receives first: a message that finds its buffer is not copied twice.
        messages = [("from", source, part) for source, buffer in receives.items() for part in _parts(buffer)]
        messages += [("to", destination, part) for destination in destinations for part in _parts(send)]
        requests: list[_Request] = []
        peers = self.peers
        for direction, peer, part in messages:
            start = self._comm.Irecv if direction == "from" else self._comm.Isend
            try:
                requests.append((direction, peer, start(part, peers.index(peer), tag), part))
            except self._mpi.Exception as error:
                self._abandoned.extend(requests)
                raise self.lost(peer, direction, tag, str(error)) from None
        self.bytes_sent += send.nbytes * len(destinations)
        exchange = MpiExchange(self, requests, tag)
        exchange.test()  # MPI moves all that is under way, but only while it is called
        return exchange

    def completed(self, request: _Request, tag: int) -> bool:
        """Return whether a request is through. Raises MessageError if it failed or if its message is too short."""
        direction, peer, handle, part = request
        status = self._mpi.Status()
        try:
            done = handle.Test(status)
            received = status.Get_count(self._mpi.BYTE) if done and direction == "from" else part.nbytes
        except self._mpi.Exception as error:
            raise self.lost(peer, direction, tag, str(error)) from None
        if received != part.nbytes:
            raise self.misfit(peer, tag, f"{received} bytes", f"{part.nbytes}")
        return done

    def abandon(self, requests: list[_Request]) -> None:
        """Keep the memory of requests that nobody will wait for any more."""
        self._abandoned.extend(requests)

    def close(self) -> None:
        """See Transport. After a failure the communicator is left to the end of the process."""
        if self._comm is not None and not self._abandoned:
            self._comm.Free()
        self._comm = None


class MpiExchange:
    """The requests of one MpiTransport.exchange, each completed on its own (a failing Waitall leaves stale handles).

    requests: those that are not through yet.
    """

    def __init__(self, transport: MpiTransport, requests: list[_Request], tag: int):
        self._transport = transport
        self.requests = requests
        self._tag = tag

    def _first_done(self) -> bool:
        try:
            return self._transport.completed(self.requests[0], self._tag)
        except MessageError:
            self._transport.abandon(self.requests)
            raise

    def test(self) -> bool:
        """See Exchange."""
        while self.requests and self._first_done():
            self.requests.pop(0)
        return not self.requests

    def wait(self) -> None:
        """See Exchange."""
        deadline = time.monotonic() + self._transport.timeout_s
        progress = self._transport.progress
        while self.requests:
            direction, peer, *_ = self.requests[0]
            self._transport.note_wait(peer)
            if not poll(self._first_done, deadline):
                self._transport.abandon(self.requests)
                raise self._transport.no_answer(peer, direction, self._tag)
            self.requests.pop(0)
            progress.tick()
        progress.wait_for(None)

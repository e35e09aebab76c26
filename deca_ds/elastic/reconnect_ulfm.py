"""ReconnectingUlfm: messages over an MPI in which the others continue when a process dies (ULFM, `mpirun --with-ft`).

ULFM (user-level failure mitigation) turns a dead peer into an error of the call that needs it. Other ranks may see no
error, or see it later, so one agreement over all ranks of all clients decides whether an exchange counts. If it does
not, the ranks do this:

1. A rank that has seen an error revokes the gossip communicator before the agreement, so that no rank waits for
   messages of one that has given up. Afterwards each rank completes every request on its own (a request that it forgot,
   or a failing Waitall, would end the job later).
2. They shrink the world to the living ranks. A client that has lost a rank leaves with the others, until all clients
   are whole.
3. They split the world anew, one gossip communicator per group of ranks, agree that this has worked, and change the
   view.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from deca_ds.elastic.survivor_commit import answers_in, bits
from deca_ds.errors import LOOK_AT_THE_KILLED, DisconnectedError, RankLostError
from deca_ds.launch.view import View
from deca_ds.plural import named
from deca_ds.transport import Endpoint, MpiExchange, MpiTransport, poll

if TYPE_CHECKING:
    from mpi4py import MPI

_DRAIN_S = 60.0  # for a revoked communicator to end its requests, which it does at once
_NEWS_BYTES = 256


class ReconnectingUlfm(MpiTransport):
    """See MpiTransport and Reconnecting; it keeps the end's membership current.

    world: a communicator of all ranks of the job in rank order. announcement: what the leader of the first client of a
    new view tells the others.
    """

    def __init__(
        self,
        world: MPI.Comm,
        announcement: Callable[[View], str],
        end: Endpoint,
    ):
        self._everybody = self.duplicate(world, end.timeout_s)
        self._ranks = self._everybody.Get_group()  # of the start: what ranks are numbered by
        self._color = end.layout.group_of(end.rank)
        own = self._everybody.Split(color=self._color, key=end.rank)
        super().__init__(own, end)
        self._announcement = announcement
        self._exchanges: list[MpiExchange] = []

    def _exchange(
        self, send: Tensor, destinations: Sequence[int], receives: Mapping[int, Tensor], tag: int
    ) -> MpiExchange:
        """See Transport."""
        self._exchanges = [exchange for exchange in self._exchanges if exchange.requests]
        started = super()._exchange(send, destinations, receives, tag)
        self._exchanges.append(started)
        return started

    def agree(self, answers: Sequence[bool]) -> list[bool]:
        """See Reconnecting."""
        number = np.array([bits(answers)], dtype=np.int32)
        try:
            request = self._everybody.Iagree(number)
            if not poll(request.Test, time.monotonic() + self.timeout_s):
                raise DisconnectedError(
                    f"no agreement within {self.timeout_s:g} s: not all ranks have come to it",
                    where=f"client {self.client}",
                    fix="look for a rank that hangs; if it is only slow, raise cluster.timeout_s",
                )
        except self._mpi.Exception:
            return []
        finally:
            self.progress.tick()
        return answers_in(int(number[0]), len(answers))

    def reconnect(self) -> bool:
        """See Reconnecting."""
        self._end_requests()
        before = self.members
        while True:
            self._everybody = self._everybody.Shrink()
            self._everybody.Set_errhandler(self._mpi.ERRORS_RETURN)
            living = self._living()
            whole = [c for c in before.clients if all(rank in living for rank in self.layout.ranks_of(c))]
            if self.client not in whole:
                lost = sorted(set(self.layout.ranks_of(self.client)) - living)
                raise RankLostError(
                    f"client {self.client} has lost {named('rank', lost)}",
                    where=f"client {self.client}",
                    fix=LOOK_AT_THE_KILLED,
                )
            view = View(before.number + 1, tuple(whole), before.total)
            if len(living) > sum(len(self.layout.ranks_of(c)) for c in whole):
                continue  # the next shrink waits until the ranks of incomplete clients have left
            try:
                comm = self._everybody.Split(color=self._color, key=self.rank)
                announcement = self._announce(view)
                through = True
            except self._mpi.Exception:  # one more was lost
                self._everybody.Revoke()
                through = False
            if self.agree([through]) == [True]:
                break
        comm.Set_errhandler(self._mpi.ERRORS_RETURN)
        self._comm = comm
        self.epoch += 1
        if view.clients != before.clients:
            self.membership.change(replace(view, announcement=announcement))
        return self.members != before

    def _living(self) -> set[int]:
        """Return the ranks of the shrunk world, by their numbers at the start."""
        group = self._everybody.Get_group()
        return set(self._mpi.Group.Translate_ranks(group, list(range(group.size)), self._ranks))

    def _announce(self, view: View) -> str:
        """Return the announcement of the lowest living rank."""
        text = bytearray(_NEWS_BYTES)
        if self._everybody.Get_rank() == 0:
            own = self._announcement(view).encode()
            text[: len(own)] = own
        self._everybody.Bcast(text, root=0)
        return text.rstrip(b"\0").decode()

    def give_up(self) -> None:
        """See Reconnecting."""
        assert self._comm is not None, "the transport is closed"
        if not self._comm.Is_revoked():
            self._comm.Revoke()

    def _end_requests(self) -> None:
        """Complete all pending requests."""
        self.give_up()
        deadline = time.monotonic() + _DRAIN_S
        left = [request for exchange in self._exchanges for request in exchange.requests] + self._abandoned
        self._abandoned = [request for request in left if not poll(partial(self._ended, request[2]), deadline)]
        self._exchanges = []

    def _ended(self, handle: MPI.Request) -> bool:
        try:
            return bool(handle.Test())
        except self._mpi.Exception:
            return True

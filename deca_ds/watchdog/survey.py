"""The rank that hosts the job's store tells all that stand still how patient they have to be.

It reads every heartbeat once a second. Each rank that stands still would otherwise read those of all ranks that it
waits for, directly and through others, which in a ring or at a barrier are all there are.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Mapping

from torch.distributed import Store

from deca_ds.launch import ClientLayout
from deca_ds.launch.progress import EVERYBODY, SHARED
from deca_ds.watchdog.heartbeats import Heartbeats, Sighting, Sightings, look_after_s, told_key


class Survey:
    """For the watcher thread of the store's host; `heartbeats`: this rank's."""

    def __init__(self, heartbeats: Heartbeats):
        self._heartbeats = heartbeats
        self._seen = Sightings()

    def publish(self, store: Store) -> None:
        """Tell each rank that stands still for how long neither it nor any that it waits for has moved on."""
        own = self._heartbeats
        layout, timeout_s, now = own.progress.layout, own.progress.timeout_s, time.monotonic()
        if layout is None or timeout_s is None:
            return
        there = sorted(own.ranks())
        self._seen.look(there, store, now)
        seen = {rank: self._seen[rank] for rank in there if rank in self._seen}
        early_s = look_after_s(timeout_s) / 2  # for it to be there when a rank comes to look
        standing = {rank: one for rank, one in seen.items() if now - one.moved >= early_s}
        if standing:
            moved = patience(seen, standing, layout, now)
            for rank in standing:
                store.set(told_key(rank), json.dumps([round(now - moved[rank], 3), time.time()]))


def patience(
    seen: Mapping[int, Sighting], standing: Mapping[int, Sighting], layout: ClientLayout, now: float
) -> dict[int, float]:
    """rank -> when it, or one that it waits for, directly or through others, has last moved on. standing: those of
    `seen` that may wait. In time proportional to the ranks and the waits."""
    for_all: list[int] = []  # who waits for everybody
    shared: list[int] = []  # who waits for all that note the same
    of_client: dict[int, list[int]] = defaultdict(list)  # who waits for all ranks of its own client
    waiters: dict[int, list[int]] = defaultdict(list)  # who waits for a rank of another client
    for rank, one in standing.items():
        awaits = one.heartbeat.awaits
        if one.silent(now):
            continue
        if awaits == EVERYBODY:
            for_all.append(rank)
            continue
        of_client[layout.client_of(rank)].append(rank)
        if awaits == SHARED:
            shared.append(rank)
        elif isinstance(awaits, int):
            for partner in layout.partners(rank, awaits):
                waiters[partner].append(rank)
    moved: dict[int, float] = {}
    for source in sorted(seen, key=lambda rank: -seen[rank].moved):  # whom it reaches, it is the last to have moved for
        reached, for_all = [source, *for_all], []
        while reached:
            rank = reached.pop()
            if rank not in moved:
                moved[rank] = seen[source].moved
                reached += waiters[rank] + of_client.pop(layout.client_of(rank), [])
                if seen[rank].heartbeat.awaits == SHARED:
                    reached, shared = reached + shared, []
    return moved

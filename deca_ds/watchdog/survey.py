"""The rank that hosts the job's store tells all stalled ranks how much patience they need.

It reads every heartbeat once a second. Otherwise each stalled rank would read those of all ranks that it waits for,
directly and through others; in a ring or at a barrier these are all ranks of the job.
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
    """What the store's host sees of all ranks; belongs to its watcher thread. heartbeats: of this rank."""

    def __init__(self, heartbeats: Heartbeats):
        self._heartbeats = heartbeats
        self._seen = Sightings()

    def publish(self, store: Store) -> None:
        """Tell each stalled rank for how long neither it nor any rank that it waits for has made progress."""
        own = self._heartbeats
        layout, timeout_s, now = own.progress.layout, own.progress.timeout_s, time.monotonic()
        if layout is None or timeout_s is None:
            return
        there = sorted(own.ranks())
        self._seen.look(there, store, now)
        seen = {rank: self._seen[rank] for rank in there if rank in self._seen}
        early_s = look_after_s(timeout_s) / 2  # so that the message is there when a rank looks for it
        standing = {rank: one for rank, one in seen.items() if now - one.moved >= early_s}
        if standing:
            moved = patience(seen, standing, layout, now)
            for rank in standing:
                store.set(told_key(rank), json.dumps([round(now - moved[rank], 3), time.time()]))


def patience(
    seen: Mapping[int, Sighting], standing: Mapping[int, Sighting], layout: ClientLayout, now: float
) -> dict[int, float]:
    """Return, by rank, the time of the last progress of this rank and of all that it waits for, directly or through
    others. standing: those of `seen` that may wait. Takes time proportional to the ranks and the waits."""
    for_all: list[int] = []  # ranks that wait for everybody
    shared: list[int] = []  # ranks that wait for all that note the same
    of_client: dict[int, list[int]] = defaultdict(list)  # ranks that wait for all ranks of their own client
    waiters: dict[int, list[int]] = defaultdict(list)  # by rank, the ranks of other clients that wait for it
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
    for source in sorted(seen, key=lambda rank: -seen[rank].moved):  # the latest progress decides for all it reaches
        reached, for_all = [source, *for_all], []
        while reached:
            rank = reached.pop()
            if rank not in moved:
                moved[rank] = seen[source].moved
                reached += waiters[rank] + of_client.pop(layout.client_of(rank), [])
                if seen[rank].heartbeat.awaits == SHARED:
                    reached, shared = reached + shared, []
    return moved

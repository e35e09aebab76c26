"""All ranks meet in the job's store before anything else, so that a host that never started costs a minute and is
named."""

from __future__ import annotations

import time

from deca_ds.errors import AbsentError
from deca_ds.launch.given import Given, given, look_at_hosts
from deca_ds.launch.launcher import Launch
from deca_ds.launch.store import JobStore, of_two_jobs
from deca_ds.plural import first_few, named

_FIRST_S = 10.0  # that the first rank, which knows who is missing, is ahead of the others
_POLL_S = 0.05
_SHOWN = 8
_HERE, _ALL = "meet/{}", "meet/all"


def meet(launch: Launch, store: JobStore, meet_s: float) -> None:
    """Wait for all ranks that are started together. Raises, on the first of them, where a guard tells the others,
    AbsentError if one does not come within `meet_s` seconds, and LaunchError if one may be another job's."""
    if launch.world_size == 1:
        return
    store.store.set(_HERE.format(launch.rank), launch.host)
    is_first = launch.rank == launch.first
    if not (_all_come(launch, store, meet_s) if is_first else store.comes(_ALL, meet_s + _FIRST_S)):
        silent = [rank for rank in launch.ranks if not store.store.check([_HERE.format(rank)])]
        raise AbsentError(
            silence(silent, launch, given(), meet_s)
            if silent
            else f"rank {launch.first} has met all other ranks, but they have not heard of it",
            where="cluster.meet_s: the ranks meet",
            fix=look_at_hosts(
                "look at the output of those hosts: ssh, the path of python and the working folder must be the same on "
                "all of them; where ranks are slow to start raise cluster.meet_s"
            ),
        )
    if is_first:
        if twice := store.came_twice(launch):
            raise of_two_jobs(
                launch, f"two processes have come as rank {first_few(twice, _SHOWN)}: one is of another job"
            )
        store.store.set(_ALL, "")


def _all_come(launch: Launch, store: JobStore, within_s: float) -> bool:
    """Wait for all ranks; return whether they come within `within_s` seconds."""
    deadline = time.monotonic() + within_s
    keys = [_HERE.format(rank) for rank in launch.ranks]
    while not store.store.check(keys):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def silence(silent: list[int], launch: Launch, given: Given, meet_s: float) -> str:
    """Say who did not come, host by host where the launcher tells the hosts."""
    who = named("rank", silent, _SHOWN)
    if len(given.hosts) == launch.world_size:
        hosts = dict.fromkeys(given.hosts[rank] for rank in silent)
        there = {host for rank, host in enumerate(given.hosts) if rank in launch.ranks and rank not in silent}
        names = [host + (" (in part)" if host in there else "") for host in hosts]
        who = f"{named('host', names)}: {who}"
    came = len(launch.ranks) - len(silent)
    return f"{who} did not start within {meet_s:g} s; {came} of {len(launch.ranks)} ranks are there"

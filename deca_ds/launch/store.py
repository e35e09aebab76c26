"""The job's store: a small key-value server hosted by rank 0, through which ranks find each other and report failures.

It carries addresses and messages of a few hundred bytes, never parameters and never data.
"""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from ipaddress import ip_address
from typing import Any

from torch.distributed import HashStore, Store, TCPStore

from deca_ds.errors import AbsentError, LaunchError, in_words
from deca_ds.launch.given import given, look_at_hosts
from deca_ds.launch.launcher import Launch
from deca_ds.launch.mpi_start import late, starting
from deca_ds.launch.progress import EVERYBODY, Progress
from deca_ds.plural import named

_ANSWER_S = 30.0  # for a store to answer
MEETING = "job store"  # name of the thread that makes the store
_SHORTEST_S, _LONGEST_S = 0.001, 0.25  # between two questions whether a key is there
_RESOLVES_S = 10.0  # for the name of the first rank's host to become known
_RANKS, _CAME = "came", "came/{}"


@dataclass(frozen=True)
class JobStore:
    """A store and the address that further connections to it use (None for a single process). timeout: of waits, until
    somebody watches `progress`, this rank's."""

    store: Store
    address: tuple[str, int] | None
    timeout: timedelta
    progress: Progress = field(default_factory=Progress, compare=False)
    _gathered: Counter[str] = field(default_factory=Counter, compare=False)  # how often each key was used

    def reconnect(self) -> Store:
        """Make another connection, for a thread: a connection that waits for a key blocks all who share it."""
        if self.address is None:
            return self.store
        return _join(self.address, self.timeout)

    def gather(self, launch: Launch, key: str, value: Any, together: Sequence[int] | None = None) -> dict[int, Any]:
        """Return rank -> the JSON-able value, of a few hundred bytes, that each of the ranks `together` gives to all of
        them, ascending; all use the same keys. None: all that are started together.

        Raises LaunchError that names the ranks that do not come within the store's time limit; where this rank is
        watched, those that are at work may take longer.
        """
        self._gathered[key] += 1
        key = f"{key}/{self._gathered[key]}"
        own = {rank: f"{key}/{rank}" for rank in together or launch.ranks}
        self.store.set(own[launch.rank], json.dumps(value))
        if launch.rank == min(own):
            every = [(rank, json.loads(self._get(part, launch, own))) for rank, part in own.items()]
            self.store.set(key, json.dumps(every))
        return dict(json.loads(self._get(key, launch, own)))

    def _get(self, key: str, launch: Launch, parts: dict[int, str]) -> bytes:
        within_s = self.timeout.total_seconds()
        with self.progress.waiting(EVERYBODY if len(parts) == len(launch.ranks) else None):
            while not self.comes(key, within_s):
                if self.progress.timeout_s is not None:  # the watcher knows how long
                    continue
                missing = [rank for rank, part in parts.items() if not self.store.check([part])]
                raise AbsentError(
                    f"rank {launch.rank} on {launch.host} waited {within_s:g} s for "
                    + (named("rank", missing) if missing else f"rank {min(parts)}, which knows of all"),
                    where=key.rsplit("/", 1)[0],
                    fix="look at the output of these ranks",
                )
            return self.store.get(key)

    def comes(self, key: str, within_s: float) -> bool:
        """Wait for a key; return whether it is there within so many seconds. Raises RuntimeError if the store is gone.

        It is asked again and again: Python handles no signal while torch waits, and a wait in vain has torch print a
        lot.
        """
        deadline, pause_s = time.monotonic() + within_s, _SHORTEST_S
        while not self.store.check([key]):
            if time.monotonic() > deadline:
                return False
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_S)
        return True

    def came_twice(self, launch: Launch) -> list[int]:
        """Return the ranks as which two processes have come: two jobs were given one port."""
        return [rank for rank in launch.ranks if self.store.add(_CAME.format(rank), 0) > 1]

    def publish_server(self, key: str) -> Store:
        """Host a new store on this machine and publish its address under `key` for `join_server`."""
        if self.address is None:
            return HashStore()
        host = own_address(self.address)
        server = TCPStore(host, 0, is_master=True, timeout=self.timeout, wait_for_workers=False)
        self.store.set(key, f"{host} {server.port}")
        return server

    def join_server(self, key: str) -> Store:
        """Connect to the store that another rank published under `key`. Raises AbsentError if none did in time."""
        if not self.comes(key, self.timeout.total_seconds()):
            raise AbsentError(
                f"nobody hosted a store within {self.timeout.total_seconds():g} s",
                where=key,
                fix="look at the output of that client's first rank",
            )
        host, port = self.store.get(key).decode().split()
        return TCPStore(host, int(port), is_master=False, timeout=self.timeout, wait_for_workers=False)


def open_job_store(
    launch: Launch,
    timeout_s: float,
    meet_s: float | None = None,
    *,
    answer_s: float = _ANSWER_S,
    resolves_s: float = _RESOLVES_S,
) -> JobStore:
    """Host (the first rank) or join the job's store; under MPI rank 0 picks a free port and broadcasts it.

    timeout_s: of later waits. Raises LaunchError if that rank cannot be reached within `meet_s` seconds, by default as
    many; soon, if its address or port is none: after `resolves_s` seconds if its name stands for no address, and after
    twice `answer_s` seconds if something else answers there; and if another job has its store there.
    """
    timeout = timedelta(seconds=timeout_s)
    meeting = timedelta(seconds=timeout_s if meet_s is None else meet_s)
    if launch.world_size == 1:
        return JobStore(HashStore(), None, timeout)
    is_host = launch.rank == launch.first
    store: Store
    try:
        if launch.master is not None:
            address = launch.master
            _resolve(address, "MASTER_ADDR", resolves_s)
            store = _meet(address, is_host, meeting, answer_s)
            store.set_timeout(timeout)
            _come(store, launch)
        else:
            address, store = _open_over_mpi(launch, is_host, meeting)
            store.set_timeout(timeout)
    except RuntimeError as error:
        host, port = launch.master or ("a free port", 0)
        why, fix = (
            str(error).splitlines()[0],
            look_at_hosts(f"check that {given().host(launch.first)} runs and that the hosts reach each other"),
        )
        if "timed out" in why:
            why = f"nobody has answered within {meeting.total_seconds():g} s"
        elif is_host and "EADDRINUSE" in str(error):
            why, fix = f"port {port} is in use on this host", "choose another MASTER_PORT (deepspeed --master_port)"
        elif is_host and "EACCES" in str(error):
            why, fix = f"port {port} needs privileges", "choose a MASTER_PORT of 1024 or more (deepspeed --master_port)"
        raise (LaunchError if is_host else AbsentError)(
            f"rank {launch.rank} on {launch.host} cannot {'host' if is_host else 'reach'} the job's store: {why}",
            where=f"MASTER_ADDR={host} MASTER_PORT={port}" if launch.master else "MPI",
            fix=fix,
        ) from error
    return JobStore(store, address, timeout)


def _meet(address: tuple[str, int], is_host: bool, timeout: timedelta, answer_s: float) -> TCPStore:
    """Connect to the store at `address`, or host it. A thread makes it, because TCPStore waits for ever for a first
    answer, which another program at this address may never give."""
    made: queue.Queue[TCPStore | RuntimeError] = queue.Queue()

    def make() -> None:
        try:
            # a client tries twice
            made.put(TCPStore(*address, is_master=is_host, timeout=timeout / 2, wait_for_workers=False))
        except RuntimeError as error:
            made.put(error)

    threading.Thread(target=make, name=MEETING, daemon=True).start()
    answered = False  # whether somebody was there, an answer's time ago
    while True:
        try:
            store = made.get(timeout=answer_s)
        except queue.Empty:
            if answered:
                raise RuntimeError("a program listens there that is not the job's store") from None
            with contextlib.suppress(OSError), socket.create_connection(address, answer_s):
                answered = True
            continue
        if isinstance(store, RuntimeError):
            raise store
        return store


def _come(store: Store, launch: Launch) -> None:
    """Note that this rank has come, before it changes anything else in the store. Raises LaunchError where the store is
    of another job, to which it would seem to be one of its own ranks."""
    ranks = int(store.compare_set(_RANKS, "", str(launch.world_size)))
    what = None
    if ranks != launch.world_size:
        what = f"{ranks} ranks instead of {launch.world_size}"
    elif store.add(_CAME.format(launch.rank), 1) > 1:
        what = f"its rank {launch.rank} already"
    if what is not None:
        who = f"rank {launch.rank} on {launch.host}"
        raise of_two_jobs(launch, f"{who} has come to the store of another job, which has {what}")


def of_two_jobs(launch: Launch, what: str) -> LaunchError:
    """Return what to raise where two jobs were given one port."""
    host, port = launch.master or ("", 0)
    fix = "give each job a MASTER_PORT of its own (deepspeed --master_port), or wait until the other one has ended"
    return LaunchError(what, where=f"MASTER_ADDR={host} MASTER_PORT={port}", fix=fix)


def _open_over_mpi(launch: Launch, is_host: bool, timeout: timedelta) -> tuple[tuple[str, int], Store]:
    with starting(launch, timeout.total_seconds()):
        from mpi4py import MPI  # importing starts MPI, which only ranks of an MPI launch may do

    world = MPI.COMM_WORLD
    if world.size != launch.world_size:
        raise LaunchError(
            f"{launch.launcher} started {launch.world_size} ranks, but MPI sees {world.size}",
            where="MPI world",
            fix=look_at_hosts(
                "mpi4py is built for another MPI than the one that launched the job: use the mpirun of that library"
            ),
        )
    arrived = world.Ibarrier()  # the one call of these that can be given a deadline; once all are here, none waits long
    deadline = time.monotonic() + timeout.total_seconds()
    while not arrived.Test():
        if time.monotonic() > deadline:
            raise late(launch, timeout.total_seconds())
        time.sleep(0.001)
    on_this_host = world.Split_type(MPI.COMM_TYPE_SHARED)
    one_host = on_this_host.size == world.size
    on_this_host.Free()
    server, address = None, bytearray(256)
    if is_host:
        host = "127.0.0.1" if one_host else _reachable_address(launch)
        server = TCPStore(host, 0, is_master=True, timeout=timeout, wait_for_workers=False)
        text = f"{host} {server.port}".encode()
        address[: len(text)] = text
    world.Bcast(address, root=0)
    host, port = address.rstrip(b"\0").decode().split()
    store = server or TCPStore(host, int(port), is_master=False, timeout=timeout, wait_for_workers=False)
    return (host, int(port)), store


def _reachable_address(launch: Launch) -> str:
    address: str = _resolve((launch.host, 0), f"the name of rank {launch.rank}'s host")[1][0]
    if ip_address(address).is_loopback:
        raise LaunchError(
            f"the name of host {launch.host} stands for {address}, which other hosts cannot reach",
            where="job store under MPI",
            fix=look_at_hosts(
                "pass the address of rank 0 and a free port: mpirun -x MASTER_ADDR=ADDRESS -x MASTER_PORT=29500 ..."
            ),
        )
    return address


def host_again(former: JobStore) -> JobStore:
    """Host a new, empty store on this machine, in place of one whose host is gone."""
    assert former.address is not None, "a single process has no host"
    host = own_address(former.address)
    server = TCPStore(host, 0, is_master=True, timeout=former.timeout, wait_for_workers=False)
    return JobStore(server, (host, server.port), former.timeout)


def join_again(former: JobStore, address: tuple[str, int]) -> JobStore:
    """Connect to the store that another rank has hosted by `host_again`."""
    return join_job_store(address, former.timeout.total_seconds())


def join_job_store(address: tuple[str, int], timeout_s: float, *, answer_s: float = _ANSWER_S) -> JobStore:
    """Connect to the store of a job that is under way. Raises AbsentError if it does not answer within `answer_s`
    seconds."""
    host, port = address
    timeout = timedelta(seconds=timeout_s)
    try:
        store = _join((host, port), timeout, answer_s)
    except RuntimeError as error:
        raise AbsentError(
            f"the job's store is out of reach: {error}", where=f"{host} {port}", fix="look at the network"
        ) from error
    return JobStore(store, (host, port), timeout)


def _join(address: tuple[str, int], timeout: timedelta, answer_s: float = _ANSWER_S) -> TCPStore:
    """Connect to a store that exists already: one that does not answer soon has gone, or is out of reach."""
    within = min(timeout, timedelta(seconds=answer_s))
    store = TCPStore(*address, is_master=False, timeout=within, wait_for_workers=False)
    store.set_timeout(timeout)
    return store


def own_address(peer: tuple[str, int]) -> str:
    """Return the address of this host's interface towards `peer`: the one that the others can reach as well."""
    family, address = _resolve(peer, "the job's store")
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # connecting a UDP socket sends nothing
        probe.connect(address)
        own: str = probe.getsockname()[0]
        return own


def _resolve(address: tuple[str, int], whose: str, within_s: float = 0.0) -> tuple[socket.AddressFamily, Any]:
    """Return family and socket address of a host and port, IPv4 if a name has both. Raises LaunchError if the name does
    not resolve within `within_s` seconds: the name of a host that is starting may appear late."""
    host, port = address
    deadline = time.monotonic() + within_s
    while True:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            break
        except (OSError, UnicodeError) as error:
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"{host!r} stands for no address: {in_words(error)}",
                    where=whose,
                    fix=look_at_hosts("look for a typing error, or give the number of the address"),
                ) from None
        time.sleep(0.5)
    family, *_, best = min(found, key=lambda each: each[0] != socket.AF_INET)
    return family, best

"""A client that has gone from a job comes back: how its ranks find the coordinator (protocol.py) and ask."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deca_ds.elastic.quorum_server import QuorumServer
from deca_ds.elastic.voter import Addresses
from deca_ds.elastic.wire import CONNECT_S, JsonConnection, is_in_reach
from deca_ds.errors import AbsentError, LaunchError
from deca_ds.launch import ClientLayout, Launch
from deca_ds.launch.store import JobStore, join_job_store, own_address
from deca_ds.watchdog.restart import JOIN

FILE = "coordinators.json"
_PAUSE_S = 3.0  # before asking again


@dataclass(frozen=True)
class Visit:
    """line: to the coordinator, of client `coordinator`. invitation: what it says about the job. own: this client's own
    coordinator, on its leader. addresses: of all coordinators."""

    line: JsonConnection
    coordinator: int
    invitation: Mapping[str, Any]
    own: QuorumServer | None
    addresses: Addresses


def join_job(
    launch: Launch, layout: ClientLayout, folder: Path, timeout_s: float, silence_s: float, until: float = 0.0
) -> tuple[Visit, JobStore]:
    """Ask those whose addresses lie in `folder`, the run's, to let this rank's client come back; the job's store, too.
    silence_s: see Coordinator.

    Raises LaunchError if nobody is there who could, or some of those who are in are out of reach, or the client is
    still in, or its ranks do not come within `timeout_s` seconds; before the time `until`, by time.time(), it asks
    again instead.
    """
    client = layout.client_of(launch.rank)
    own: QuorumServer | None = None
    while True:
        try:
            addresses = _read(folder / FILE)
            if launch.rank == layout.leader_of(client):
                host, everybody = _address_towards(addresses), range(layout.clients)
                own = own or QuorumServer(layout, client, host, timeout_s, everybody, silence_s)
                addresses[client] = own.address
            visit = _ask_to_join(launch.rank, client, addresses, own, timeout_s)
            _check_reach(visit)
            return visit, join_job_store(visit.invitation["store"], timeout_s)
        except LaunchError:
            if time.time() > until:
                raise
        time.sleep(_PAUSE_S)


def _ask_to_join(rank: int, client: int, addresses: Addresses, own: QuorumServer | None, timeout_s: float) -> Visit:
    deadline = time.monotonic() + timeout_s
    for other, address in addresses.items():
        if other == client:
            continue
        try:
            connection = socket.create_connection(address, CONNECT_S)
        except OSError:
            continue
        line = JsonConnection(connection)
        line.send({"kind": "join", "rank": rank, "address": None if own is None else own.address})
        connection.settimeout(max(0.1, deadline - time.monotonic()))
        for message in line.receive() or []:
            if message["kind"] == "invitation":
                connection.settimeout(None)
                return Visit(line, other, message, own, addresses)
            if message["kind"] == "out":
                raise AbsentError(message["why"], where=JOIN, fix="join when the others have lost it")
        if time.monotonic() > deadline:
            raise AbsentError(f"the other ranks of client {client} did not come within {timeout_s:g} s", where=JOIN)
    raise AbsentError(
        "none of the other clients is there and in training",
        where=", ".join(f"{host} {port}" for host, port in addresses.values()),
        fix="join a job that goes on with cluster.on_failure=continue over torch; if it has ended, resume it",
    )


def _check_reach(visit: Visit) -> None:
    """One that some cannot reach would hold them all up, and have to leave again."""
    everybody = {client: (host, port) for client, host, port in visit.invitation["addresses"]}
    apart = [client for client in visit.invitation["clients"] if not is_in_reach(everybody[client])]
    if apart:
        visit.line.connection.close()
        raise AbsentError(f"client {', '.join(map(str, apart))} is out of reach from here", where=JOIN,
                          fix="look at the network")  # fmt: skip


def _address_towards(addresses: Addresses) -> str:
    try:
        return own_address(next(iter(addresses.values())))
    except OSError as error:
        raise AbsentError(
            f"there is no way to the other clients: {error}", where=JOIN, fix="look at the network"
        ) from None


def save_addresses(folder: Path, addresses: Addresses) -> None:
    """Where a client that comes back finds the others; written as a whole or not at all."""
    partial = folder / f"{FILE}.{os.getpid()}.partial"
    partial.write_text(json.dumps({str(client): address for client, address in addresses.items()}) + "\n")
    os.replace(partial, folder / FILE)


def _read(path: Path) -> Addresses:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        read = {int(client): (str(host), int(port)) for client, (host, port) in json.loads(path.read_text()).items()}
        if read:
            return read
    raise LaunchError(
        "there are no addresses of a job to join",
        where=str(path),
        fix="give run.output of a run with cluster.on_failure=continue over torch, on this host or copied from another",
    )

"""How the ranks of a client that has left a job find the coordinator (protocol.py), and ask it to let them rejoin."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deca_ds.elastic.quorum_server import QuorumServer
from deca_ds.elastic.voter import Addresses
from deca_ds.elastic.wire import CONNECT_S, JsonConnection, is_in_reach
from deca_ds.errors import AbsentError, LaunchError, in_words
from deca_ds.launch import ClientLayout, Launch
from deca_ds.launch.store import JobStore, join_job_store, own_address
from deca_ds.plural import named
from deca_ds.run_folder import COORDINATORS, DONE, FAILED, STOPPED
from deca_ds.watchdog.restart import JOIN

_PAUSE_S = 3.0


@dataclass(frozen=True)
class Rejoin:
    """An accepted request to rejoin. line: the connection to the coordinator, of client `coordinator`. invitation: what
    it says about the job. own: this client's own coordinator, on its leader. addresses: of all coordinators."""

    line: JsonConnection
    coordinator: int
    invitation: Mapping[str, Any]
    own: QuorumServer | None
    addresses: Addresses


def join_job(
    launch: Launch,
    layout: ClientLayout,
    folder: Path,
    timeout_s: float,
    silence_s: float,
    until: float = 0.0,
    pause_s: float = _PAUSE_S,
    is_over: Callable[[], bool] = lambda: False,
) -> tuple[Rejoin, JobStore] | None:
    """Ask the coordinators whose addresses lie in `folder`, the run's, to let this rank's client rejoin, and connect to
    the job's store. silence_s: see Coordinator. Returns None if that cannot be because the job `is_over`.

    Raises LaunchError if no coordinator can let it in, if a member is out of reach, if the client is still a member, or
    if its other ranks do not ask within `timeout_s` seconds. Until the time `until`, by time.time(), it asks again
    instead, `pause_s` seconds later.
    """
    client = layout.client_of(launch.rank)
    own: QuorumServer | None = None
    while True:
        try:
            addresses = _read(folder / COORDINATORS)
            if launch.rank == layout.leader_of(client):
                host, everybody = _address_towards(addresses), range(layout.clients)
                own = own or QuorumServer(layout, client, host, timeout_s, everybody, silence_s)
                addresses[client] = own.address
            rejoin = _ask_to_join(launch.rank, client, addresses, own, timeout_s)
            try:
                _check_reach(rejoin)
                return rejoin, join_job_store(rejoin.invitation["store"], timeout_s)
            except BaseException:
                rejoin.line.connection.close()
                raise
        except LaunchError:
            if is_over():
                return None
            if time.time() > until:
                raise
        time.sleep(pause_s)


def _ask_to_join(rank: int, client: int, addresses: Addresses, own: QuorumServer | None, timeout_s: float) -> Rejoin:
    deadline, asleep = time.monotonic() + timeout_s, list[int]()
    for other, address in addresses.items():
        if other == client:
            continue
        try:
            line = JsonConnection(socket.create_connection(address, CONNECT_S))
        except OSError:
            continue
        line.send({"kind": "join", "rank": rank, "address": None if own is None else own.address})
        answer = line.answer(deadline)  # an invitation may be taken back at once
        kind = answer.get("kind")
        if kind == "invitation":
            return Rejoin(line, other, answer, own, addresses)
        line.connection.close()
        if kind == "out" and "why" in answer:
            raise AbsentError(str(answer["why"]), where=JOIN, fix="join when the others have dropped it")
        if kind == "asleep":
            asleep.append(other)
        if time.monotonic() > deadline:
            raise AbsentError(
                f"the other ranks of client {client} did not come within {timeout_s:g} s",
                where=JOIN,
                fix="start all its ranks, and look at the output of those that have ended",
            )
    raise _nobody(addresses, asleep)


def _nobody(addresses: Addresses, asleep: Sequence[int]) -> AbsentError:
    """Return the error where no coordinator lets a client in. asleep: the clients whose coordinators have answered, but
    are not active."""
    where = ", ".join(f"{host} {port}" for host, port in addresses.values())
    if asleep:
        return AbsentError(
            f"no other client lets this one in, though {named('client', asleep)} answered: the job has not begun to "
            "train yet, or the client that decides is out of reach from here",
            where=where,
            fix="join again later; if that does not help, look at the network",
        )
    return AbsentError(
        "no other client answers: the job has ended, or it is out of reach from here",
        where=where,
        fix=f"look into run.output of another client. {DONE} there: the job has finished, and the trained models are "
        f"there for deca export. {STOPPED} or {FAILED}: resume the run with all clients. None of them: it may be "
        f"training, so look at the network, and copy {COORDINATORS} from there",
    )


def _check_reach(rejoin: Rejoin) -> None:
    """Raise AbsentError if a member is out of reach: all would wait for this client, and it would have to leave."""
    everybody = {client: (host, port) for client, host, port in rejoin.invitation["addresses"]}
    apart = [client for client in rejoin.invitation["clients"] if not is_in_reach(everybody[client])]
    if apart:
        raise AbsentError(f"cannot reach {named('client', apart)} from here", where=JOIN, fix="look at the network")


def _address_towards(addresses: Addresses) -> str:
    try:
        return own_address(next(iter(addresses.values())))
    except OSError as error:
        raise AbsentError(
            f"there is no way to the other clients: {in_words(error)}", where=JOIN, fix="look at the network"
        ) from None


def save_addresses(folder: Path, addresses: Addresses) -> None:
    """Write the file in which a rejoining client finds the others, as a whole or not at all."""
    partial = folder / f"{COORDINATORS}.{os.getpid()}.partial"
    partial.write_text(json.dumps({str(client): address for client, address in addresses.items()}) + "\n")
    os.replace(partial, folder / COORDINATORS)


def _read(path: Path) -> Addresses:
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        read = {int(client): (str(host), int(port)) for client, (host, port) in json.loads(path.read_text()).items()}
        if read:
            return read
    raise LaunchError(
        "there are no addresses of a job to join",
        where=str(path),
        fix="give run.output of a run with cluster.on_failure=continue over torch, on this host or copied from another",
    )

"""A timed test of every edge of the graph before training: an edge that does not carry messages ends the run here."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from deca_ds.errors import DisconnectedError, MessageError
from deca_ds.launch import Launch
from deca_ds.launch.given import look_at_hosts
from deca_ds.launch.store import JobStore
from deca_ds.plural import several
from deca_ds.run_folder import EDGES
from deca_ds.transport.transport import PROBE_TAG, Transport

LARGE_BYTES = 2**20
_ROUND_TRIPS = 3  # of each size; the fastest counts, after one that opens the connection


def probe_edges(
    transport: Transport, neighbours: Sequence[int], launch: Launch, store: JobStore
) -> list[dict[str, Any]]:
    """Time every edge of the graph; all ranks of all clients call this, each tests its shard's own connections.

    neighbours: all that the rank's client ever exchanges with, ascending.

    Returns, on every rank, an entry an edge: clients and hosts of both ends and, per shard index, round_trip_ms of 8
    bytes and mb_per_s of one-MiB messages (10^6 bytes, both ways added, half a round trip each). Where clients differ
    in size the figures are of each pair of `ranks` whose slices of a large parameter intersect. The edges of a client
    are tested one after the other, in an order that all clients share, so that none waits in a circle. All shards
    are tested side by side, as they gossip. Raises DisconnectedError that names an edge's both ends if a message is
    lost or is another one than was sent.
    """
    hosts = store.gather(launch, "edges/hosts", launch.host)
    measured, layout = [], transport.layout
    for j, partner in [(other, rank) for other in neighbours for rank in transport.routes.edge(other)]:
        transport.progress.enter(f"testing the edge to client {j}")
        try:
            figures = _measure(transport, partner)
        except MessageError as error:
            ends = sorted([launch.rank, partner])
            places = " and ".join(f"client {layout.client_of(rank)} (rank {rank} on {hosts[rank]})" for rank in ends)
            raise DisconnectedError(
                f"the edge between {places} does not carry messages: {error.what}",
                where="edge test at the start",
                fix=look_at_hosts(
                    "check that these hosts reach each other: firewall, GLOO_SOCKET_IFNAME or MPI's network interface"
                ),
            ) from error
        if j > transport.client:
            measured.append((j, partner, figures))
    every = store.gather(launch, "edges/measured", measured)
    edges: dict[tuple[int, int], dict[str, Any]] = {}
    for rank, rows in every.items():
        i = layout.client_of(rank)
        for j, partner, (round_trip_ms, mb_per_s) in rows:
            edge = edges.setdefault((i, j), {"clients": [i, j], "hosts": [hosts[rank], hosts[partner]], "shards": []})
            ranks = {} if layout.even else {"ranks": [rank, partner]}
            edge["shards"].append({**ranks, "round_trip_ms": round_trip_ms, "mb_per_s": mb_per_s})
    return [edges[ends] for ends in sorted(edges)]


def save_edges(edges: list[dict[str, Any]], folder: Path) -> str:
    """Write the result of `probe_edges` to edges.json; returns a line about the slowest edge."""
    (folder / EDGES).write_text(json.dumps(edges, indent=1) + "\n")
    slowest = min(edges, key=lambda edge: min(shard["mb_per_s"] for shard in edge["shards"]))
    (i, j), (here, there) = slowest["clients"], slowest["hosts"]
    return (
        f"slowest of {several(len(edges), 'edge')}: client {i} on {here} - client {j} on {there}, "
        f"round trip {max(shard['round_trip_ms'] for shard in slowest['shards']):.2f} ms, "
        f"{min(shard['mb_per_s'] for shard in slowest['shards']):,.0f} MB/s"
    )


def _measure(transport: Transport, partner: int) -> tuple[float, float]:
    """Return the round trip of 8 bytes in ms, and the rate of LARGE_BYTES in MB/s, between this rank and `partner`."""
    small, large = _fastest(transport, partner, 8), _fastest(transport, partner, LARGE_BYTES)
    return round(1e3 * small, 4), round(2 * LARGE_BYTES / large / 1e6, 1)


def _fastest(transport: Transport, partner: int, size: int) -> float:
    """Return seconds of the fastest round trip of a message of `size` bytes; the rank with the lower number begins."""
    own = transport.rank
    sent = torch.arange(size, dtype=torch.int64).add_(min(own, partner)).to(torch.uint8)
    received = torch.empty_like(sent)
    seconds = []
    for _ in range(1 + _ROUND_TRIPS):
        started = time.perf_counter()
        for sends in (own < partner, own > partner):
            to, sources = ([partner], {}) if sends else ([], {partner: received})
            transport.exchange(sent, to, sources, PROBE_TAG).wait()
        seconds.append(time.perf_counter() - started)
        if not torch.equal(sent, received):
            raise MessageError("another message came than should have been sent")
    return min(seconds[1:])

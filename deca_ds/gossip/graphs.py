"""Communication graphs on n clients.

Every builder returns a tuple of directed graphs on the nodes 0..n-1, one for each step of its period (of length 1 for a
static graph). An edge j -> i means that client i receives from client j; an undirected graph has both directions. With
one or two clients there is only one connected graph, so every kind gives that one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import TypeAlias

import networkx as nx

from deca_ds.config.paths import read_given
from deca_ds.config.yaml_text import choices
from deca_ds.errors import GossipError

Graphs: TypeAlias = "tuple[nx.DiGraph[int], ...]"

GRAPH_KEY = "gossip.graph"
EDGES_KEY = "gossip.edges"
PROBABILITY_KEY = "gossip.edge_probability"
MAX_DRAWS = 1000  # of an Erdos-Renyi graph before it is given up as too sparse to be connected


def _torus(n: int) -> nx.Graph[int]:
    a = next(a for a in range(math.isqrt(n), 0, -1) if n % a == 0)
    if a < 2 and n > 2:
        raise GossipError(
            f"a torus needs n = a * b clients with a, b of at least 2, and {n} is prime",
            where=GRAPH_KEY,
            fix="set cluster.clients to such a product (4, 6, 8, 9, 12, ...), or use gossip.graph=ring",
        )
    grid = nx.grid_2d_graph(a, n // a, periodic=True)
    numbered: nx.Graph[int] = nx.convert_node_labels_to_integers(grid, ordering="sorted")
    return numbered


def _hypercube(n: int) -> nx.Graph[int]:
    if n & (n - 1):
        raise GossipError(
            f"a hypercube needs a power of two clients, not {n}",
            where=GRAPH_KEY,
            fix="set cluster.clients to 2, 4, 8, 16, ..., or use gossip.graph=exponential, which takes any number",
        )
    dimensions = n.bit_length() - 1
    return nx.Graph((i, i ^ (1 << bit)) for i in range(n) for bit in range(dimensions))


def _complete_bipartite(n: int) -> nx.Graph[int]:
    """Join every client of the first half with every client of the second."""
    graph: nx.Graph[int] = nx.complete_bipartite_graph((n + 1) // 2, n // 2)
    return graph


def _offsets(n: int) -> list[int]:
    """Return 1, 2, 4, ... below n: ceil(log2 n) of them."""
    return [1 << k for k in range((n - 1).bit_length())]


def _circulant(n: int, offsets: list[int]) -> nx.DiGraph[int]:
    """Make the graph in which client i receives from (i - offset) mod n for each offset."""
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_nodes_from(range(n))
    graph.add_edges_from(((i - offset) % n, i) for i in range(n) for offset in offsets)
    return graph


def exponential(n: int) -> Graphs:
    """Make the static exponential graph: client i receives from i - 1, i - 2, i - 4, ... (mod n).

    Ying et al. 2021, "Exponential Graph is Provably Efficient for Decentralized Deep Training".
    """
    return (_circulant(n, _offsets(n)),)


def one_peer_exponential(n: int) -> Graphs:
    """Make the exponential graph with one neighbour at a time: at averaging t client i receives from client
    i - 2^(t mod ceil(log2 n)) (mod n).

    For n a power of two one period gives the exact average (Ying et al. 2021).
    """
    return tuple(_circulant(n, [offset]) for offset in _offsets(n)) or (_circulant(n, []),)


def random_pairs(n: int, seed: int) -> Graphs:
    """Put all clients in pairs, 2 ceil(log2 n) times, drawn from `seed`, as in NoLoCo (arXiv 2506.10911); of an odd
    number one client has no partner. The period is drawn again until its pairs connect all clients."""
    generator = random.Random(seed)
    while True:
        period = [_pairs(n, generator) for _ in range(2 * len(_offsets(n)))]
        if nx.is_strongly_connected(nx.compose_all(period)):
            return tuple(period)


def _pairs(n: int, generator: random.Random) -> nx.DiGraph[int]:
    drawn = generator.sample(range(n), n)
    graph: nx.Graph[int] = nx.Graph()
    graph.add_nodes_from(range(n))
    graph.add_edges_from(zip(drawn[::2], drawn[1::2], strict=False))
    return graph.to_directed()


def erdos_renyi(n: int, probability: float, seed: int) -> Graphs:
    """Draw G(n, p) from `seed` until it is connected. Raises GossipError after MAX_DRAWS draws."""
    if not 0.0 < probability <= 1.0:
        raise GossipError(
            f"{probability} is not a probability above 0 and up to 1",
            where=PROBABILITY_KEY,
            fix="set it within (0, 1], for example 0.5",
        )
    generator = random.Random(seed)
    for _ in range(MAX_DRAWS):
        graph = nx.gnp_random_graph(n, probability, seed=generator)
        if nx.is_connected(graph):
            return (graph.to_directed(),)
    raise GossipError(
        f"none of {MAX_DRAWS} random graphs on {n} clients with edge probability {probability} is connected",
        where=PROBABILITY_KEY,
        fix=f"raise it; connected graphs are likely from ln(n) / n = {math.log(n) / n:.2f} on",
    )


def edge_list(path: str | None, n: int) -> Graphs:
    """Read an undirected graph from a file: two client numbers a line, blank lines and `# comments` skipped.

    Raises GossipError, with file and line, for a malformed edge, and for a graph that misses a client or falls apart.
    """
    if not path:
        raise GossipError(
            "the graph edge_list needs a file of edges", where=EDGES_KEY, fix="set gossip.edges to its path"
        )
    lines = read_given(path, "the edge list", GossipError, where=f"{EDGES_KEY}={path}").splitlines()
    graph: nx.Graph[int] = nx.Graph()
    graph.add_nodes_from(range(n))
    for number, line in enumerate(lines, start=1):
        fields = line.split("#")[0].replace(",", " ").split()
        if fields:
            graph.add_edge(*_parse_edge(fields, n, where=f"{path}:{number}"))
    components = sorted(map(sorted, nx.connected_components(graph)))
    if len(components) > 1:
        raise GossipError(
            f"the graph falls apart: no path from client {components[0][0]} to clients {components[1][:8]}",
            where=f"{EDGES_KEY}={path}",
            fix=f"add edges that join all clients 0..{n - 1}",
        )
    return (graph.to_directed(),)


def _parse_edge(fields: list[str], n: int, where: str) -> tuple[int, int]:
    try:
        a, b = (int(field) for field in fields)
    except ValueError:
        raise GossipError(
            f"expected two client numbers, got {' '.join(fields)!r}", where=where, fix="write an edge as: 0 1"
        ) from None
    for client in (a, b):
        if not 0 <= client < n:
            raise GossipError(
                f"there is no client {client}",
                where=where,
                fix=f"clients are numbered 0..{n - 1} (cluster.clients={n})",
            )
    if a == b:
        raise GossipError(
            f"client {a} is joined to itself", where=where, fix="remove the line: own weights are implied"
        )
    return a, b


def isolated(n: int) -> Graphs:
    """Make the graph without edges: every client trains alone."""
    return (_circulant(n, []),)


_UNDIRECTED: dict[str, Callable[[int], nx.Graph[int]]] = {
    "ring": nx.cycle_graph,
    "complete": nx.complete_graph,
    "star": lambda n: nx.star_graph(n - 1),  # client 0 is the centre
    "torus": _torus,
    "hypercube": _hypercube,
    "bipartite": _complete_bipartite,
}
_CIRCULANT: dict[str, Callable[[int], Graphs]] = {
    "exponential": exponential,
    "one_peer_exponential": one_peer_exponential,
    "isolated": isolated,
}


def build_graphs(kind: str, n: int, *, edges: str | None = None, probability: float = 0.5, seed: int = 0) -> Graphs:
    """Make the graphs of one period for a value of `gossip.graph`. Raises GossipError if it does not fit n clients."""
    if n == 1:
        return isolated(1)
    if kind in _UNDIRECTED:
        graph = _UNDIRECTED[kind](n)
        graph.remove_edges_from(list(nx.selfloop_edges(graph)))
        return (graph.to_directed(),)
    if kind in _CIRCULANT:
        return _CIRCULANT[kind](n)
    if kind == "random_pairs":
        return random_pairs(n, seed)
    if kind == "erdos_renyi":
        return erdos_renyi(n, probability, seed)
    if kind == "edge_list":
        return edge_list(edges, n)
    raise GossipError(f"unknown graph {kind!r}", where=GRAPH_KEY, fix=f"use one of {', '.join(choices(GRAPH_KEY))}")

"""The mixing matrices that are left when clients are gone."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import networkx as nx
import numpy as np

from deca_ds.gossip import weights
from deca_ds.gossip.schedule import MixingSchedule
from deca_ds.plural import named


def without(mixing: MixingSchedule, missing: Collection[int]) -> MixingSchedule:
    """Return a period of matrices over the same clients, in which `missing` ones neither send nor receive.

    The graph `base`, whose clients all reach each other, is made anew for those that are left, so that they still agree
    after a period. Else every matrix becomes the Metropolis-Hastings matrix of its graph, taken as undirected, without
    the missing clients: doubly stochastic, symmetric, positive only on edges that both ends survive. A missing client's
    row and column are those of the identity. Give it the matrices that the run was started with: with no client missing
    they come back as they were.
    """
    if not missing:
        return mixing
    matrices = _of_those_left(mixing, missing) or _without_edges(mixing, missing)
    return MixingSchedule(f"{mixing.name} without {named('client', sorted(missing))}", mixing.size, tuple(matrices))


def _of_those_left(mixing: MixingSchedule, missing: Collection[int]) -> list[np.ndarray]:
    left = [client for client in range(mixing.size) if client not in missing]
    if mixing.of_fewer is None or not left:
        return []
    matrices = []
    for among in mixing.of_fewer(len(left)):
        matrix = np.eye(mixing.size)
        matrix[np.ix_(left, left)] = among
        matrices.append(matrix)
    return matrices


def _without_edges(mixing: MixingSchedule, missing: Collection[int]) -> list[np.ndarray]:
    matrices = []
    for matrix in mixing.matrices:
        graph: nx.DiGraph[int] = nx.DiGraph()
        graph.add_nodes_from(range(mixing.size))
        joined = (matrix > 0) | (matrix.T > 0)
        edges = ((int(i), int(j)) for i, j in np.argwhere(joined) if i != j)
        graph.add_edges_from(edge for edge in edges if not set(edge) & set(missing))
        matrices.append(weights.weigh(graph, "metropolis"))
    return matrices


def parts(mixing: MixingSchedule, clients: Sequence[int]) -> list[list[int]]:
    """Split `clients` into the groups that averagings join over a whole period; one group if all of them mix."""
    graph: nx.Graph[int] = nx.Graph()
    graph.add_nodes_from(clients)
    for matrix in mixing.matrices:
        graph.add_edges_from((i, j) for i in clients for j in clients if i != j and matrix[i, j] > 0)
    return sorted(map(sorted, nx.connected_components(graph)))


def spectral_gap(mixing: MixingSchedule, clients: Sequence[int]) -> float:
    """Return the spectral gap (see weights.spectral_gap) of averagings among `clients`, which no others send to."""
    chosen = np.ix_(clients, clients)
    return weights.spectral_gap([matrix[chosen] for matrix in mixing.matrices])

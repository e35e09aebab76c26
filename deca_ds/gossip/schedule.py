"""MixingSchedule: which client mixes what from whom at every averaging of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from deca_ds.config.schema import GossipConfig
from deca_ds.errors import GossipError
from deca_ds.gossip import graphs, weights
from deca_ds.gossip.base_graph import base_graph
from deca_ds.plural import several


@dataclass(frozen=True, eq=False)
class MixingSchedule:
    """The mixing matrices of one period; averaging t = 0, 1, ... uses matrices[t mod period].

    name: for people. size: number of clients n. matrices: (n, n) float64, read-only. of_fewer: makes the matrices of
    so many clients, for those that are left when others are gone; None where they keep the edges that they have.
    """

    name: str
    size: int
    matrices: tuple[np.ndarray, ...]
    of_fewer: Callable[[int], tuple[np.ndarray, ...]] | None = None

    def __post_init__(self) -> None:
        for matrix in self.matrices:
            weights.validate_stochastic(matrix, self.size)
            matrix.setflags(write=False)

    @property
    def period(self) -> int:
        """Number of averagings after which the matrices repeat."""
        return len(self.matrices)

    def matrix(self, t: int) -> np.ndarray:
        """Return W of averaging t, (n, n) float64."""
        return self.matrices[t % self.period]

    def weight(self, i: int, j: int, t: int) -> float:
        """Return w_ij of averaging t: what client i multiplies the values of client j by."""
        return float(self.matrix(t)[i, j])

    def sources(self, i: int, t: int) -> list[int]:
        """Return the clients that client i receives from at averaging t, ascending, without itself."""
        return self._sources[t % self.period][i]

    def destinations(self, i: int, t: int) -> list[int]:
        """Return the clients that client i sends to at averaging t, ascending, without itself."""
        return self._destinations[t % self.period][i]

    def neighbours(self, i: int) -> list[int]:
        """Return the clients that any matrix joins client i with, in either direction, ascending."""
        joined = (set(self.sources(i, t)) | set(self.destinations(i, t)) for t in range(self.period))
        return sorted(set().union(*joined))

    @cached_property
    def _sources(self) -> list[list[list[int]]]:
        return [_others(matrix) for matrix in self.matrices]

    @cached_property
    def _destinations(self) -> list[list[list[int]]]:
        return [_others(matrix.T) for matrix in self.matrices]

    def sends(self, t: int) -> bool:
        """Return whether averaging t joins any two clients."""
        matrix = self.matrix(t)
        return bool(np.count_nonzero(matrix) > np.count_nonzero(matrix.diagonal()))

    @property
    def spectral_gap(self) -> float:
        """1 - the factor that an averaging shrinks the distance to the mean by; see weights.spectral_gap."""
        return weights.spectral_gap(self.matrices)

    @property
    def max_sources(self) -> int:
        """Largest number of neighbours that a client receives from in one averaging."""
        return max(len(self.sources(i, t)) for t in range(self.period) for i in range(self.size))

    @property
    def messages(self) -> float:
        """Number of shards that travel in one averaging, over all clients (mean over the period)."""
        edges = sum(len(self.sources(i, t)) for t in range(self.period) for i in range(self.size))
        return edges / self.period

    def summary(self) -> str:
        """Describe the schedule in a line for the plan and the start of a run."""
        if self.size == 1:
            return f"{self.name} on 1 client"
        period = f", period {self.period}" if self.period > 1 else ""
        return (
            f"{self.name} on {several(self.size, 'client')}{period}: "
            f"at most {several(self.max_sources, 'neighbour')} a client, "
            f"the block is sent {self.messages:g} time{'s' if self.messages != 1 else ''} per averaging, "
            f"spectral gap {self.spectral_gap:.4g}"
        )


def _others(matrix: np.ndarray) -> list[list[int]]:
    """Return for each row the places of its entries that are not zero, without the diagonal."""
    return [[int(j) for j in np.flatnonzero(row) if j != i] for i, row in enumerate(matrix)]


def build_mixing(config: GossipConfig, clients: int, seed: int) -> MixingSchedule:
    """Make the schedule that `gossip.*` asks for; the same on every rank. Raises GossipError that names the wrong key.

    seed: run.seed, for random graphs.
    """
    if clients < 1:
        raise GossipError(f"{clients} clients cannot mix", where="cluster.clients", fix="set it to 1 or more")
    if config.matrix:
        return MixingSchedule(f"matrix {config.matrix}", clients, (weights.load(config.matrix, clients),))
    if config.edges and config.graph != "edge_list":
        raise GossipError(
            f"a file of edges is given, but the graph is {config.graph}",
            where=f"gossip.edges={config.edges}",
            fix="set gossip.graph=edge_list, or remove gossip.edges",
        )
    if config.graph == "base":
        of = partial(base_graph, degree=config.degree)
        return MixingSchedule(f"base (degree {config.degree})", clients, of(clients), of_fewer=of)
    period = graphs.build_graphs(
        config.graph, clients, edges=config.edges, probability=config.edge_probability, seed=seed
    )
    matrices: Sequence[np.ndarray] = [weights.weigh(graph, config.weights) for graph in period]
    name = config.graph if config.graph == "isolated" else f"{config.graph} ({config.weights})"
    return MixingSchedule(name, clients, tuple(matrices))

"""Mixing matrices: from a graph by a rule, from a file, their validation and their speed of averaging.

W[i, j] is the weight that client i gives to what it receives from client j. W is doubly stochastic (rows sum to 1: a
consensus stays one; columns sum to 1: averaging keeps the mean of all clients) and float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import networkx as nx
import numpy as np

from deca_ds.config.paths import read_given
from deca_ds.config.yaml_text import choices
from deca_ds.errors import GossipError

WEIGHTS_KEY = "gossip.weights"
MATRIX_KEY = "gossip.matrix"
SUM_TOLERANCE = 1e-6  # of a row or column sum in a user's matrix
_ROUND_OFF = 1e-9  # what float64 eigenvalues of a small matrix may be off by


def weigh(graph: nx.DiGraph[int], rule: str) -> np.ndarray:
    """Make the doubly stochastic W, (n, n), of an undirected graph or a directed circulant. d_i: neighbours of i.

    metropolis       w_ij = 1 / (1 + max(d_i, d_j))     (Metropolis-Hastings; Xiao, Boyd and Lall 2005)
    max_degree       w_ij = 1 / (1 + max_k d_k)
    lazy_metropolis  (I + W_metropolis) / 2

    and w_ii = 1 - sum_j w_ij. On a directed circulant all degrees d are equal, so that metropolis and max_degree both
    are the uniform 1 / (1 + d). Raises GossipError for an unknown rule.
    """
    n = graph.number_of_nodes()
    degree = np.array([graph.in_degree(i) for i in range(n)])
    if rule in ("metropolis", "lazy_metropolis"):
        pair_degree = np.maximum(degree[:, None], degree[None, :])
    elif rule == "max_degree":
        pair_degree = np.full((n, n), degree.max())
    else:
        raise GossipError(
            f"unknown rule {rule!r}", where=WEIGHTS_KEY, fix=f"use one of {', '.join(choices(WEIGHTS_KEY))}"
        )
    receives = nx.to_numpy_array(graph, nodelist=range(n)).T > 0
    matrix = np.where(receives, 1.0 / (1.0 + pair_degree), 0.0)
    np.fill_diagonal(matrix, 1.0 - matrix.sum(axis=1))
    return (np.eye(n) + matrix) / 2 if rule == "lazy_metropolis" else matrix


def load(path: str, n: int) -> np.ndarray:
    """Read a mixing matrix, (n, n): n lines of n numbers (decimals or fractions like 1/3) parted by commas or blanks.

    Blank lines and `# comments` are skipped. Sums that are off by rounding (below SUM_TOLERANCE) are scaled back to 1,
    because an error of 1e-6 per averaging would shrink the model like weight decay does. Raises GossipError with file
    and line, or with the row or column.
    """
    lines = read_given(path, "the mixing matrix", GossipError, where=f"{MATRIX_KEY}={path}").splitlines()
    rows: list[list[float]] = []
    for number, line in enumerate(lines, start=1):
        fields = line.split("#")[0].replace(",", " ").replace(";", " ").split()
        if not fields:
            continue
        row = [_parse_weight(field, where=f"{path}:{number}") for field in fields]
        if len(row) != n:
            raise GossipError(
                f"row {len(rows)} has {len(row)} numbers, expected {n}",
                where=f"{path}:{number}",
                fix=f"write {n} lines of {n} numbers for cluster.clients={n}",
            )
        rows.append(row)
    matrix = np.array(rows, dtype=np.float64).reshape(len(rows), n)
    validate(matrix, n, where=f"{MATRIX_KEY}={path}")
    for _ in range(20):  # Sinkhorn's iteration
        matrix /= matrix.sum(axis=1, keepdims=True)
        matrix /= matrix.sum(axis=0, keepdims=True)
    return matrix


def _parse_weight(field: str, where: str) -> float:
    try:
        return float(Fraction(field)) if "/" in field else float(field)
    except (ValueError, ZeroDivisionError):
        raise GossipError(f"{field!r} is not a number", where=where, fix="write weights like 0.25 or 1/3") from None


def validate(matrix: np.ndarray, n: int, where: str = MATRIX_KEY) -> None:
    """Raise GossipError unless `matrix` is doubly stochastic on n clients and averages all of them in the long run."""
    validate_stochastic(matrix, n, where)
    graph = _graph_of(matrix)
    if not nx.is_strongly_connected(graph):
        parts = sorted(map(sorted, nx.strongly_connected_components(graph)))
        raise GossipError(
            f"the mixing matrix falls apart: clients {parts[0][:8]} and clients {parts[1][:8]} never mix",
            where=where,
            fix="give positive weights along a path between all clients, or use gossip.graph=isolated",
        )
    if n > 1 and second_eigenvalue(matrix) > 1.0 - _ROUND_OFF:
        raise GossipError(
            "the mixing matrix only swaps models in a cycle (spectral gap 0)",
            where=where,
            fix="give every client a positive weight for itself, that is a positive diagonal",
        )


def validate_stochastic(matrix: np.ndarray, n: int, where: str = MATRIX_KEY) -> None:
    """Raise GossipError unless `matrix` is (n, n), finite, non-negative, and every row and column sums to 1."""
    if matrix.shape != (n, n):
        raise GossipError(
            f"the mixing matrix has shape {matrix.shape}, expected {(n, n)}",
            where=where,
            fix=f"write {n} lines of {n} numbers for cluster.clients={n}",
        )
    for bad, name in ((~np.isfinite(matrix), "not finite"), (matrix < 0, "negative")):
        if bad.any():
            i, j = np.argwhere(bad)[0]
            raise GossipError(
                f"the weight in row {i}, column {j} is {name}: {matrix[i, j]}", where=where, fix="use weights of 0 to 1"
            )
    for axis, name in ((1, "row"), (0, "column")):
        sums = matrix.sum(axis=axis)
        wrong = np.flatnonzero(np.abs(sums - 1.0) > SUM_TOLERANCE + _ROUND_OFF)
        if wrong.size:
            raise GossipError(
                f"{name} {wrong[0]} of the mixing matrix sums to {sums[wrong[0]]:.8g}, not to 1",
                where=where,
                fix="make every row and every column sum to 1; thirds can be written as 1/3",
            )


def _graph_of(matrix: np.ndarray) -> nx.DiGraph[int]:
    return nx.from_numpy_array(matrix.T > 0, create_using=nx.DiGraph)


def second_eigenvalue(matrix: np.ndarray) -> float:
    """Return the second largest |eigenvalue| of W: the asymptotic factor per averaging of the consensus error."""
    n = len(matrix)
    return float(np.abs(np.linalg.eigvals(matrix - np.full((n, n), 1.0 / n))).max())


def spectral_gap(matrices: Sequence[np.ndarray]) -> float:
    """Return 1 - rho per averaging, 0 (no averaging) to 1 (exact); rho bounds the decay of the distance to the mean.

    One symmetric W: rho is its second largest |eigenvalue|. A directed or time-varying schedule of period tau: rho is
    sigma^(1/tau), sigma = ||W_(tau-1) ... W_1 W_0 - 11^T/n||_2, the largest singular value: in a period the distance to
    the mean shrinks at least by sigma. (The gap can be 0 for a directed matrix that averages over several periods.)
    """
    n = len(matrices[0])
    product = np.eye(n)
    for matrix in matrices:
        product = matrix @ product
    sigma = float(np.linalg.norm(product - np.full((n, n), 1.0 / n), ord=2))  # symmetric: the largest |eigenvalue|
    return 0.0 if sigma > 1.0 - _ROUND_OFF else 1.0 if sigma < _ROUND_OFF else 1.0 - sigma ** (1.0 / len(matrices))

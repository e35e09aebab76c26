"""The Base-(k+1) graph: with at most k neighbours at a time, any number of clients agree exactly after a period.

Takezawa et al. 2023, "Beyond Exponential Graph: Communication-Efficient Topologies for Decentralized Learning via
Finite-time Convergence" (arXiv 2305.11420). Its matrices are symmetric, and no client need have a neighbour every time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from itertools import combinations, zip_longest
from typing import NamedTuple

import numpy as np


class Edge(NamedTuple):
    """An edge between clients a and b, each of which gives the other's values this weight."""

    a: int
    b: int
    weight: float


Round = list[Edge]  # what one averaging joins


def base_graph(n: int, degree: int) -> tuple[np.ndarray, ...]:
    """Return the mixing matrices of one period, each (n, n): in their product every entry is 1 / n.

    degree: k, at least 1. A period has at most 2 log_(k+1)(n) + 2 averagings.
    """
    matrices = []
    for edges in _shorter(n, degree):
        matrix = np.zeros((n, n))
        for a, b, weight in edges:
            matrix[a, b] = matrix[b, a] = weight
        np.fill_diagonal(matrix, 1.0 - matrix.sum(axis=1))
        matrices.append(matrix)
    return tuple(matrices) or (np.eye(n),)


def _shorter(n: int, degree: int) -> list[Round]:
    """Split n = p q, where p has the prime factors up to k + 1: p groups of q clients agree, then the q p-tuples of
    clients with the same place in their groups. If that takes no more rounds, all n clients agree at once."""
    p = max(d for d in range(1, n + 1) if n % d == 0 and _sizes(d, degree) is not None)
    q = n // p
    groups = [range(start, start + q) for start in range(0, n, q)]
    product = _together(_any_number(group, degree) for group in groups)
    product += _together(_cliques(range(place, n, q), degree) for place in range(q))
    whole = _any_number(range(n), degree)
    return min(whole, product, key=len)


def _any_number(clients: Sequence[int], degree: int) -> list[Round]:
    """Return the rounds of the paper's simple Base-(k+1) graph.

    In the base k + 1, n = a_1 (k+1)^p_1 + a_2 (k+1)^p_2 + ...; so many clients are in the sets V_1, V_2, ... First each
    set agrees. Then, from the first set on, each client of the later ones averages with one client of each of the a_l
    parts of V_l, which leaves the mean of all clients in each part and in the later sets; and each part agrees.
    """
    n, base = len(clients), degree + 1
    if _sizes(n, degree) is not None:
        return _cliques(clients, degree)
    parts: list[list[Sequence[int]]] = []
    start = 0
    for size in _powers(base, n):
        count = (n - start) // size
        if count:
            parts.append([clients[start + size * i : start + size * (i + 1)] for i in range(count)])
            start += size * count
    sets = [sum((list(part) for part in each), []) for each in parts]
    rounds = _together(_cliques(each, degree) for each in sets)
    lines = []
    for place, each in enumerate(parts[:-1]):
        later = sum(sets[place + 1 :], [])
        weight = len(each[0]) / (len(sets[place]) + len(later))
        exchange = [Edge(mine, other, weight) for part in each for mine, other in zip(part, later, strict=False)]
        agree = _together(_cliques(part, degree) for part in each)
        lines.append([*([] for _ in range(place)), exchange, *agree])
    return rounds + _together(lines)


def _cliques(clients: Sequence[int], degree: int) -> list[Round]:
    """Return a round for each factor up to k + 1 of the number of clients. With a digit for each factor, clients that
    differ in one digit alone take their mean in its round (the paper's k-peer hyper-hypercube graph)."""
    sizes = _sizes(len(clients), degree)
    assert sizes is not None
    rounds = []
    step = 1
    for size in sizes:
        edges = []
        for first in range(len(clients)):
            if first // step % size == 0:
                clique = [clients[first + step * digit] for digit in range(size)]
                edges += [Edge(a, b, 1.0 / size) for a, b in combinations(clique, 2)]
        rounds.append(edges)
        step *= size
    return rounds


@cache
def _sizes(n: int, degree: int) -> tuple[int, ...] | None:
    """Return as few factors of n as possible, each from 2 to k + 1; None if n is no product of these."""
    if n == 1:
        return ()
    found = [
        (*rest, size)
        for size in range(2, min(n, degree + 1) + 1)
        if n % size == 0 and (rest := _sizes(n // size, degree)) is not None
    ]
    return min(found, key=len, default=None)


def _powers(base: int, most: int) -> list[int]:
    """Return the powers 1, base, base^2, ... up to `most`, the largest first."""
    powers = [1]
    while powers[-1] * base <= most:
        powers.append(powers[-1] * base)
    return powers[::-1]


def _together(lines: Iterable[list[Round]]) -> list[Round]:
    """Merge sequences of rounds whose clients are disjoint, so that they run at the same time."""
    return [sum(edges, []) for edges in zip_longest(*lines, fillvalue=[])]

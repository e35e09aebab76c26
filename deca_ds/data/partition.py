"""Who gets which examples: pure functions of labels, numbers and a seed, the same on every rank.

Every function returns sorted int64 index arrays that are disjoint and together are range(count).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from deca_ds.errors import DataError

Indices = npt.NDArray[np.int64]
DRAWS = 100


def iid(count: int, clients: int, seed: int | Sequence[int]) -> list[Indices]:
    """Partition `count` examples at random into shares whose sizes differ by one at most.

    Raises DataError if there are fewer examples than clients.
    """
    if count < clients:
        raise DataError(
            f"{count} training examples cannot be shared out among {clients} clients",
            where="data.train",
            fix="give more data or set a smaller cluster.clients",
        )
    return [np.sort(share) for share in np.array_split(np.random.default_rng(seed).permutation(count), clients)]


def dirichlet(
    labels: Sequence[str] | Indices, clients: int, alpha: float, seed: int | Sequence[int], minimum: int = 1
) -> list[Indices]:
    """Return label-skewed shares: of each label, client i gets the share p_i, p ~ Dir(alpha, ..., alpha), drawn per
    label.

    They are drawn again, up to DRAWS times, until every client has at least `minimum` examples. Raises DataError if
    none will do.
    Source: Hsu, Qi and Brown, "Measuring the effects of non-identical data distribution", 2019, and the variant per
    label of Yurochkin et al., ICML 2019.
    """
    generator = np.random.default_rng(seed)
    members = _members(labels)
    for _ in range(DRAWS):
        parts: list[list[Indices]] = [[] for _ in range(clients)]
        for of_label in members:
            cumulated = np.cumsum(generator.dirichlet(np.full(clients, alpha)))[:-1]
            cuts = np.round(cumulated * len(of_label)).astype(np.int64)
            for client, part in enumerate(np.split(generator.permutation(of_label), cuts)):
                parts[client].append(part)
        shares = [np.sort(np.concatenate([*part, np.empty(0, np.int64)])) for part in parts]
        if min(len(share) for share in shares) >= minimum:
            return shares
    raise DataError(
        f"in {DRAWS} draws of the Dirichlet partition some client always had fewer than {minimum} examples "
        f"({len(labels)} examples, {len(members)} labels, {clients} clients)",
        where=f"data.alpha = {alpha}",
        fix="set a larger data.alpha, fewer cluster.clients, or give more data",
    )


def by_key(values: Sequence[str] | Indices, clients: int) -> list[Indices]:
    """Deal out whole groups of equal values, from the largest group to the client with the fewest examples so far.

    Raises DataError if there are fewer distinct values than clients.
    """
    groups = _members(values)
    if len(groups) < clients:
        raise DataError(
            f"{len(groups)} distinct values cannot be dealt to {clients} clients",
            where="data.partition_column",
            fix="name a column with more values, set a smaller cluster.clients, or data.partition=dirichlet",
        )
    parts: list[list[Indices]] = [[] for _ in range(clients)]
    sizes = [0] * clients
    for group in sorted(groups, key=len, reverse=True):  # stable: equal groups stay in the order of their values
        smallest = sizes.index(min(sizes))
        parts[smallest].append(group)
        sizes[smallest] += len(group)
    return [np.sort(np.concatenate(part)) for part in parts]


def hold_out(count: int, fraction: float, seed: int | Sequence[int]) -> tuple[Indices, Indices]:
    """Return (kept, held out): a random `fraction` of `count` examples is held out, at least one where that leaves
    one."""
    held = min(max(1, round(fraction * count)), count - 1) if fraction > 0 and count >= 2 else 0
    order = np.random.default_rng(seed).permutation(count)
    return np.sort(order[held:]), np.sort(order[:held])


def choose(count: int, limit: int | None, seed: int | Sequence[int]) -> Indices:
    """Choose at most `limit` of `count` examples at random; all if `limit` is None."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).permutation(count)[:limit])


def _members(values: Sequence[str] | Indices) -> list[Indices]:
    """Return the ascending places of each distinct value, in the order of the values."""
    given = values if isinstance(values, np.ndarray) else np.asarray(values, dtype=object)
    _, codes, counts = np.unique(given, return_inverse=True, return_counts=True)
    return np.split(np.argsort(codes, kind="stable"), np.cumsum(counts)[:-1])

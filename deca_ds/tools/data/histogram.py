"""Bins of token lengths, and their bars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

_MOST = 8  # bins up to the longest sequence
_LEVELS = " ▁▂▃▄▅▆▇█"

Counts = Sequence[Sequence[int]]  # [tokens, how many examples have so many], ascending


@dataclass(frozen=True)
class Bin:
    """Examples of `low` to `high` tokens. cut: whether they lose some."""

    low: int
    high: int
    count: int
    cut: bool


def bins(counts: Counts, max_length: int, reach: int | None = None) -> list[Bin]:
    """Return bins of equal width up to max_length, or to the longest example where that is shorter; beyond it each is
    twice as wide as the one before. reach: the longest example of all sets that are to have the same bins."""
    longest = reach if reach is not None else counts[-1][0]
    inside = min(longest, max_length)
    width = 1
    while width * _MOST < inside:
        width *= 2
    edges = [0, *range(width, inside, width), min(-(-inside // width) * width, max_length)]
    while edges[-1] < longest:
        edges.append(2 * edges[-1])
    return [
        Bin(low + 1, high, sum(count for length, count in counts if low < length <= high), low >= max_length)
        for low, high in pairwise(edges)
    ]


def quantile(counts: Counts, share: float) -> int:
    """Return the smallest length that this share of the examples does not exceed."""
    wanted, seen = share * sum(count for _, count in counts), 0
    for length, count in counts:
        seen += count
        if seen >= wanted:
            return length
    return counts[-1][0]


def merged(several: Sequence[Counts]) -> list[list[int]]:
    """Add up the counts of several sets."""
    total: dict[int, int] = {}
    for counts in several:
        for length, count in counts:
            total[length] = total.get(length, 0) + count
    return [[length, total[length]] for length in sorted(total)]


def line(of: Sequence[Bin]) -> str:
    """Draw a character for each bin; what is there is seen, however little."""
    most = max((each.count for each in of), default=0)
    top = len(_LEVELS) - 1
    return "".join(_LEVELS[max(1, round(top * each.count / most)) if each.count else 0] for each in of)

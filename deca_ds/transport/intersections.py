"""Which elements the ranks of clients of different sizes have in common.

ZeRO-3 cuts each parameter of N elements into slices of ceil(N / k); rank r of k holds [r ceil(N/k), (r+1) ceil(N/k)),
as far as N goes, and its shard of a block is its slices one after the other, without padding. Positions here count the
elements of the whole block, parameter after parameter, so that they mean the same to clients of any size. What a rank
holds is a list of ranges of positions, ascending, and any interval of positions is contiguous in its shard.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

Range = tuple[int, int]  # first and last-plus-one


@dataclass(frozen=True)
class Chunk:
    """One rank's part of a chunk of a block. part: of its shard. meets: number of ranks k of another client ->
    (rank, ranges of `part`, counted from its start) for each of the k ranks that holds any of it."""

    part: slice[int, int, int | None]
    meets: Mapping[int, Sequence[tuple[int, Sequence[Range]]]]

    @property
    def numel(self) -> int:
        """Elements of this rank's part."""
        return self.part.stop - self.part.start


def cuts(numels: Sequence[int], ranks: int, rank: int, sizes: Sequence[int], step: int) -> list[Chunk]:
    """Cut a block into intervals of `step` positions, as rank `rank` of `ranks` sees them; parts may be empty.

    numels: elements of each parameter, in the order of the shards. sizes: numbers of ranks of the clients it meets.
    """
    own = held(numels, ranks, rank)
    others = {k: [shared(own, held(numels, k, r)) for r in range(k)] for k in set(sizes)}
    starts = range(0, sum(numels), step)
    parts = _clipped(own, starts, step)
    clipped = {k: [_clipped(ranges, starts, step) for ranges in every] for k, every in others.items()}
    found, done = [], 0
    for place in range(len(starts)):
        mine = parts[place]
        meets = {
            k: [(r, places(mine, ranges[place])) for r, ranges in enumerate(every) if ranges[place]]
            for k, every in clipped.items()
        }
        stop = done + sum(b - a for a, b in mine)
        found.append(Chunk(slice(done, stop), meets))
        done = stop
    return found


def held(numels: Sequence[int], ranks: int, rank: int) -> list[Range]:
    """Return the positions that rank `rank` of `ranks` holds; ranges that touch are one."""
    found: list[Range] = []
    for offset, numel in zip(accumulate(numels, initial=0), numels, strict=False):
        size = -(-numel // ranks)
        _append(found, offset + min(rank * size, numel), offset + min((rank + 1) * size, numel))
    return found


def shared(ones: Sequence[Range], others: Sequence[Range]) -> list[Range]:
    """Return the positions in both lists of ranges."""
    found: list[Range] = []
    i = j = 0
    while i < len(ones) and j < len(others):
        _append(found, max(ones[i][0], others[j][0]), min(ones[i][1], others[j][1]))
        if ones[i][1] < others[j][1]:
            i += 1
        else:
            j += 1
    return found


def places(whole: Sequence[Range], some: Sequence[Range]) -> list[Range]:
    """Return where `some` lie once `whole`, which holds all of them, is put together without gaps."""
    found: list[Range] = []
    offsets = accumulate((stop - start for start, stop in whole), initial=0)
    pending = iter(zip(whole, offsets, strict=False))
    (start, stop), offset = next(pending, ((0, 0), 0))
    for a, b in some:
        while a >= stop:
            (start, stop), offset = next(pending)
        _append(found, offset + a - start, offset + b - start)
    return found


def _clipped(ranges: Sequence[Range], starts: Sequence[int], step: int) -> list[list[Range]]:
    """Return the parts of `ranges` in each of the intervals [start, start + step)."""
    found: list[list[Range]] = [[] for _ in starts]
    for a, b in ranges:
        for place in range(a // step, -(-b // step)):
            found[place].append((max(a, place * step), min(b, (place + 1) * step)))
    return found


def _append(ranges: list[Range], start: int, stop: int) -> None:
    """Add a range that comes after all others, unless it is empty."""
    if start >= stop:
        return
    if ranges and ranges[-1][1] == start:
        start = ranges.pop()[0]
    ranges.append((start, stop))

"""What the ranks of clients of different sizes hold in common: every element once, whatever the sizes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deca_ds.transport.intersections import cuts, held, places, shared

NUMELS = st.lists(st.integers(1, 40), min_size=1, max_size=6)  # parameters with fewer elements than ranks, too
SIZE = st.integers(1, 9)


def elements(ranges) -> list[int]:
    return [x for a, b in ranges for x in range(a, b)]


def slices(numels, ranks: int, rank: int) -> list[int]:
    """Element by element: what ZeRO-3 gives to a rank, in the order of its shard."""
    found, offset = [], 0
    for numel in numels:
        size = -(-numel // ranks)
        found += [offset + x for x in range(numel) if x // size == rank]
        offset += numel
    return found


@given(NUMELS, SIZE)
def test_the_ranks_of_a_client_hold_every_element_once(numels, ranks):
    every = [held(numels, ranks, rank) for rank in range(ranks)]
    assert [elements(ranges) for ranges in every] == [slices(numels, ranks, rank) for rank in range(ranks)]
    assert sorted(x for ranges in every for x in elements(ranges)) == list(range(sum(numels)))


RANGES = st.lists(st.booleans(), max_size=30).map(
    lambda bits: [(i, i + 1) for i, bit in enumerate(bits) if bit]
)  # not joined, so that ranges that touch occur


@given(RANGES, RANGES)
def test_shared_ranges_and_their_places(ones, others):
    both = shared(ones, others)
    assert elements(both) == sorted(set(elements(ones)) & set(elements(others)))
    whole = elements(ones)
    assert [whole[x] for x in elements(places(ones, both))] == elements(both)


@given(NUMELS, SIZE, SIZE, st.integers(1, 50))
def test_two_clients_meet_in_every_element_once_and_in_the_same_order(numels, ranks, others, step):
    ours = [cuts(numels, ranks, rank, [ranks, others], step) for rank in range(ranks)]
    theirs = [cuts(numels, others, rank, [ranks, others], step) for rank in range(others)]
    assert len({len(every) for every in (*ours, *theirs)}) == 1
    for rank, parts in enumerate(ours):
        assert [cut.part.start for cut in parts] == [0, *(cut.part.stop for cut in parts[:-1])]
        assert parts[-1].part.stop == len(slices(numels, ranks, rank))
    for chunk, start in enumerate(range(0, sum(numels), step)):
        met = []
        for rank in range(ranks):
            mine = slices(numels, ranks, rank)[ours[rank][chunk].part]
            seen = dict(ours[rank][chunk].meets[others])
            for other in range(others):
                packed = [mine[x] for x in elements(seen.get(other, []))]
                back = dict(theirs[other][chunk].meets[ranks]).get(rank, [])
                there = slices(numels, others, other)[theirs[other][chunk].part]
                assert packed == [there[x] for x in elements(back)], "both ends pack alike"
                met += packed
        assert sorted(met) == list(range(start, min(start + step, sum(numels))))


@given(NUMELS, SIZE, st.integers(1, 50))
def test_parts_are_no_longer_than_the_interval(numels, ranks, step):
    assert all(
        cut.part.stop - cut.part.start <= step for rank in range(ranks) for cut in cuts(numels, ranks, rank, [], step)
    )

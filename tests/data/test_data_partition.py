"""Partitions are disjoint, complete, the same for the same seed, and skewed as they should be."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deca_ds.data.partition import by_key, choose, dirichlet, hold_out, iid
from deca_ds.errors import DataError

labels_of = st.lists(st.sampled_from("abcd"), min_size=1, max_size=120)


def assert_partition(shares, count, clients):
    assert len(shares) == clients
    assert sorted(np.concatenate(shares).tolist()) == list(range(count))
    assert all(np.all(np.diff(share) > 0) for share in shares)


@given(clients=st.integers(1, 9), extra=st.integers(0, 50), seed=st.integers(0, 99))
def test_iid_deals_every_row_to_exactly_one_client_in_equal_shares(clients, extra, seed):
    shares = iid(clients + extra, clients, seed)
    assert_partition(shares, clients + extra, clients)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    again = iid(clients + extra, clients, seed)
    assert all(np.array_equal(a, b) for a, b in zip(shares, again, strict=True))


@given(st.lists(st.sampled_from(["a", "b", "b\0", "10", "9"]), min_size=4, max_size=60))
def test_texts_are_dealt_out_as_their_numbers_in_order_are(texts):
    numbers = np.array([sorted(set(texts)).index(text) for text in texts])
    assert list(map(list, dirichlet(texts, 1, 1.0, 0))) == list(map(list, dirichlet(numbers, 1, 1.0, 0)))
    if len(set(texts)) > 1:
        for of_texts, of_numbers in zip(by_key(texts, 2), by_key(numbers, 2), strict=True):
            assert of_texts.tolist() == of_numbers.tolist()
            assert not {texts[i] for i in of_texts} & {texts[i] for i in range(len(texts)) if i not in of_texts}


@given(labels_of, st.integers(1, 6), st.floats(0.05, 100), st.integers(0, 99), st.integers(0, 3))
def test_dirichlet_deals_every_row_to_exactly_one_client_and_the_minimum_to_each(labels, clients, alpha, seed, minimum):
    try:
        shares = dirichlet(labels, clients, alpha, seed, minimum)
    except DataError as error:
        assert "data.alpha" in str(error) and "larger" in str(error)
        return
    assert_partition(shares, len(labels), clients)
    assert min(map(len, shares)) >= minimum
    again = dirichlet(labels, clients, alpha, seed, minimum)
    assert all(np.array_equal(a, b) for a, b in zip(shares, again, strict=True))


@given(labels_of, st.integers(1, 4))
def test_by_key_gives_each_group_whole_to_one_client(values, clients):
    if len(set(values)) < clients:
        with pytest.raises(DataError, match=r"data\.partition_column"):
            by_key(values, clients)
        return
    shares = by_key(values, clients)
    assert_partition(shares, len(values), clients)
    owners = Counter(value for share in shares for value in {values[i] for i in share})
    assert set(owners.values()) == {1}, "a group is never split"
    assert all(len(share) for share in shares)


def test_by_key_deals_the_largest_first_to_the_smallest():
    values = ["a"] * 5 + ["b"] * 4 + ["c"] * 3 + ["d"] * 1
    shares = by_key(values, 2)
    assert [{values[i] for i in share} for share in shares] == [{"a", "d"}, {"b", "c"}]


def test_a_smaller_alpha_is_more_skewed():
    labels = ["a", "b", "c", "d"] * 500

    def skew(alpha):
        shares = dirichlet(labels, 4, alpha, seed=0)
        return np.mean([max(Counter(labels[i] for i in share).values()) / len(share) for share in shares])

    assert skew(0.1) > skew(1) > skew(100)
    assert skew(0.1) > 0.6 and skew(1e4) < 0.27


def test_another_seed_is_another_partition():
    labels = ["a", "b"] * 100
    assert not np.array_equal(dirichlet(labels, 3, 1.0, 0)[0], dirichlet(labels, 3, 1.0, 1)[0])
    assert not np.array_equal(iid(100, 3, [0, 1])[0], iid(100, 3, [0, 2])[0])


def test_a_partition_that_leaves_a_client_without_enough_rows_is_refused():
    with pytest.raises(DataError, match=r"(?s)3 training examples.*4 clients.*cluster\.clients"):
        iid(3, 4, 0)
    with pytest.raises(DataError, match=r"(?s)fewer than 2 examples.*fix:.*data\.alpha"):
        dirichlet(["a"] * 3, 4, 1.0, 0, minimum=2)


@given(st.integers(0, 60), st.floats(0, 0.99), st.integers(0, 9))
def test_hold_out_splits_rows_in_two_and_always_leaves_one_to_train(count, fraction, seed):
    kept, held = hold_out(count, fraction, seed)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(count))
    assert (len(held) >= 1) == (fraction > 0 and count >= 2)
    assert count == 0 or len(kept) >= 1


def test_choose_draws_different_rows_by_the_seed_or_takes_all():
    assert choose(5, None, 0).tolist() == choose(5, 9, 0).tolist() == [0, 1, 2, 3, 4]
    assert len(set(choose(100, 10, 0).tolist())) == 10
    assert choose(100, 10, 0).tolist() == choose(100, 10, 0).tolist() != choose(100, 10, 1).tolist()

"""Batches: k ranks equal one, micro-batches change nothing, resuming is exact, evaluation covers every row once."""

from collections import Counter
from itertools import islice

import pytest
import torch
from data_samples import flat
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from deca_ds.data import evaluation_batches, training_batches
from deca_ds.errors import ConfigError

PAD = 999


def make_sequences(count):
    """Sequence i is i + 1 tokens long at most 7 and starts with i, so it is told by its first token."""
    ids = [[i] + [500] * (i % 7) for i in range(count)]
    return Dataset.from_dict({"input_ids": ids, "labels": [[-100, *one[1:]] for one in ids]})


def steps(train, number, *, ranks=1, micro=1, batch=4, **options):
    """For each step the first tokens over all ranks, in order."""
    settings_ = {"batch_size": batch, "micro_batch_size": micro, "ranks": ranks, "seed": 0, "client": 0, "pad_id": PAD}
    iterators = [training_batches(train, rank=rank, **{**settings_, **options}) for rank in range(ranks)]
    return [
        [int(row[0]) for it in iterators for micro_batch in next(it) for row in micro_batch["input_ids"]]
        for _ in range(number)
    ]


@settings(max_examples=30)
@given(
    count=st.integers(1, 23), ranks=st.sampled_from([1, 2, 4]), micro=st.sampled_from([1, 2]), start=st.integers(0, 9)
)
def test_ranks_micro_batches_and_resuming_change_nothing(count, ranks, micro, start):
    train = make_sequences(count)
    whole = steps(train, start + 3, batch=8)
    assert steps(train, 3, batch=8, ranks=ranks, micro=micro, start_step=start) == whole[start:]


def test_epochs_are_complete_and_run_into_each_other():
    seen = flat(steps(make_sequences(10), 15))
    epochs = [seen[start : start + 10] for start in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 6, "every epoch has an order of its own"


def test_seed_and_client_have_their_own_orders():
    train = make_sequences(30)
    orders = [tuple(flat(steps(train, 7, seed=seed, client=client))) for seed in (0, 1) for client in (0, 1)]
    assert len(set(orders)) == 4
    later = steps(train, 15, batch=2, start_step=15)
    assert flat(later) != list(orders[1]), "client 1 does not run one epoch ahead of client 0"


def test_a_data_set_smaller_than_a_batch_is_repeated_within_it():
    (step,) = steps(make_sequences(3), 1, batch=8)
    assert Counter(step).keys() == {0, 1, 2} and min(Counter(step).values()) >= 2


def test_a_micro_batch_is_padded_to_its_longest_row_and_padding_is_neither_seen_nor_learned():
    (micro_batches,) = islice(
        training_batches(
            make_sequences(8), batch_size=8, micro_batch_size=2, rank=1, ranks=2, seed=0, client=0, pad_id=PAD
        ),
        1,
    )
    assert len(micro_batches) == 2
    for batch in micro_batches:
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        lengths = batch["attention_mask"].sum(1)
        assert all(tensor.dtype == torch.int64 and tensor.shape == (2, lengths.max()) for tensor in batch.values())
        for ids, mask, labels, length in zip(*batch.values(), lengths, strict=True):
            assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
            assert ids[0] % 7 + 1 == length and (ids[length:] == PAD).all()
            assert (labels[length:] == -100).all() and labels[1:length].tolist() == [500] * (length - 1)


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    steps(make_sequences(5), 4)
    assert torch.equal(before, torch.get_rng_state())


def test_a_batch_that_ranks_and_micro_batches_cannot_split_is_refused():
    with pytest.raises(ConfigError, match=r"(?s)data\.batch_size = 6.*multiple of 4"):
        steps(make_sequences(5), 1, batch=6, ranks=2, micro=2)


@settings(max_examples=40)
@given(count=st.integers(1, 30), batch=st.integers(1, 5), ranks=st.integers(1, 4))
def test_evaluation_covers_every_row_once(count, batch, ranks):
    dataset = make_sequences(count)
    of_ranks = [
        list(evaluation_batches(dataset, batch_size=batch, rank=rank, ranks=ranks, pad_id=PAD)) for rank in range(ranks)
    ]
    assert len({len(batches) for batches in of_ranks}) == 1
    seen = []
    for one in (batch_ for batches in of_ranks for batch_ in batches):
        assert all(len(tensor) == batch and tensor.dtype == torch.int64 for tensor in one.values())
        for row, ids, labels in zip(one["row"].tolist(), one["input_ids"], one["labels"], strict=True):
            if row >= 0:
                assert ids[0] == row
                seen.append(row)
            else:
                assert (labels == -100).all()
    assert sorted(seen) == list(range(count))

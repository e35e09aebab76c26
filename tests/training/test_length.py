"""How long a run is, in rounds or in epochs, and what its user is told of that."""

from __future__ import annotations

import pytest

from deca_ds.config import load_config
from deca_ds.training.chosen_method import build_schedule
from deca_ds.training.length import count_rounds, length_of, tell_length

KEYS = ["model.path=x", "cluster.clients=3", "algorithm.inner_steps=5", "data.batch_size=2", "data.micro_batch_size=1"]
ROWS = [10, 20, 30]
A_ROUND = 3 * 2 * 4 * 5  # clients, sequences a step, blocks, steps: 2 epochs


def lengths(*keys: str) -> list[str]:
    config = load_config(None, [*KEYS, *keys])
    summaries = [{"client": client, "train": rows, "train_tokens": 7 * rows} for client, rows in enumerate(ROWS)]
    return tell_length(config, build_schedule(config, 4, count_rounds(config, 4, ROWS)), summaries)


@pytest.mark.parametrize(
    ("epochs", "rounds"), [(0.001, 1), (1.0, 1), (2.0, 1), (2.0001, 2), (6.0, 3), (0.1 * 3 * 20, 3), (7.0, 4)]
)
def test_epochs_are_as_many_sequences_as_all_clients_have_in_whole_rounds(epochs, rounds):
    config = load_config(None, [*KEYS, f"algorithm.epochs={epochs!r}"])
    assert count_rounds(config, 4, ROWS) == rounds
    assert A_ROUND * rounds >= epochs * sum(ROWS) * (1 - 1e-12) and (
        rounds == 1 or A_ROUND * (rounds - 1) < epochs * 60
    )


def test_rounds_count_as_they_are_and_four_where_nobody_says():
    assert count_rounds(load_config(None, [*KEYS, "algorithm.rounds=9"]), 4, ROWS) == 9
    assert count_rounds(load_config(None, KEYS), 4, ROWS) == 4


def test_the_length_is_told_in_epochs_sequences_and_tokens():
    assert lengths("algorithm.rounds=3") == [
        "length: 6 epochs, 360 sequences, about 2,520 tokens of all clients; a client goes over its data 4 to 12 times"
    ]
    (line,) = lengths("algorithm.epochs=3")
    assert line.startswith("length: 4 epochs (algorithm.epochs=3, in whole rounds of 2), 240 sequences, about 1,680 ")


def test_very_many_passes_over_few_sequences_are_warned_of():
    assert len(lengths("algorithm.rounds=7")) == 1  # 28 times over the smallest
    warning = lengths("algorithm.rounds=8")[1]
    assert warning.startswith("WARNING: client 0 goes over its 10 training sequences 32 times")
    assert "Lower algorithm.rounds, or set algorithm.epochs" in warning
    one_round = lengths("algorithm.rounds=2", "algorithm.inner_steps=50")[1]
    assert "One round is 40 times: lower algorithm.inner_steps" in one_round


def test_a_batch_that_repeats_its_sequences_is_warned_of():
    assert len(lengths("algorithm.rounds=1", "data.batch_size=10")) == 1, "as many as the smallest client has"
    twice = lengths("algorithm.rounds=1", "data.batch_size=20")[-1]
    assert twice.startswith("WARNING: data.batch_size = 20 is more than the 10 training sequences of client 0: each of")
    assert "every sequence about 2 times" in twice
    many = lengths("algorithm.rounds=1", "data.batch_size=100000")
    assert "10,000 times" in many[-1] and "e+" not in "".join(many)


def test_rounds_become_steps_sequences_epochs_and_tokens():
    config = load_config(None, [*KEYS, "algorithm.rounds=2"])
    summaries = [{"client": client, "train": rows, "train_tokens": 7 * rows} for client, rows in enumerate(ROWS)]
    found = length_of(config, build_schedule(config, 4, 2), summaries)
    assert (found.rounds, found.steps, found.sequences, found.epochs) == (2, 40, 240, 4.0)
    assert found.passes == {0: 8.0, 1: 4.0, 2: 80 / 30} and found.tokens == 3 * 7 * 80
    unseen = length_of(config, build_schedule(config, 4, 2), [])
    assert (unseen.sequences, unseen.tokens, unseen.epochs, unseen.passes) == (240, None, None, {})

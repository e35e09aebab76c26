import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_scheduler

from deca_ds.algorithm.schedule import Schedule, learning_rate

schedules = st.builds(
    Schedule,
    rounds=st.integers(1, 4),
    blocks=st.integers(2, 6),
    inner_steps=st.integers(1, 7),
    gossip_every=st.integers(1, 8),
    order=st.sampled_from(["ascending", "descending", "random"]),
    seed=st.integers(0, 99),
)


@given(schedules)
def test_every_block_is_active_once_a_round_for_all_its_inner_steps(schedule):
    steps = list(schedule)
    assert len(steps) == len(schedule) == schedule.rounds * schedule.blocks * schedule.inner_steps
    for r in range(schedule.rounds):
        of_round = [s for s in steps if s.round == r]
        assert [s.block for s in of_round if s.opens] == schedule.block_order(r)
        assert sorted(schedule.block_order(r)) == list(range(schedule.blocks))
        for first in range(0, len(of_round), schedule.inner_steps):
            activation = of_round[first : first + schedule.inner_steps]
            assert [s.inner for s in activation] == list(range(schedule.inner_steps))
            assert len({s.block for s in activation}) == 1
            assert activation[0].opens and activation[-1].closes


@given(schedules)
def test_gossip_comes_every_s_steps_and_before_a_block_closes_and_is_counted_without_gaps(schedule):
    steps = list(schedule)
    assert [s.gossip for s in steps if s.gossip is not None] == list(range(sum(s.gossip is not None for s in steps)))
    for s in steps:
        assert (s.gossip is not None) == (s.closes or (s.inner + 1) % schedule.gossip_every == 0)


def test_a_single_block_stays_active_through_all_rounds():
    steps = list(Schedule(rounds=3, blocks=1, inner_steps=4, gossip_every=3))
    assert [s.inner for s in steps] == list(range(12))
    assert [s.round for s in steps] == [0] * 4 + [1] * 4 + [2] * 4
    assert [s.index for s in steps if s.opens] == [0] and [s.index for s in steps if s.closes] == [11]
    assert [s.gossip for s in steps if s.gossip is not None] == [0, 1, 2, 3]


def test_blocks_come_ascending_descending_or_in_an_order_drawn_from_seed_and_round():
    make = lambda order, seed=0: Schedule(2, 4, 1, order=order, seed=seed)  # noqa: E731
    assert make("ascending").block_order(0) == [0, 1, 2, 3]
    assert make("descending").block_order(0) == [3, 2, 1, 0]
    drawn = [make("random", seed).block_order(r) for seed in range(5) for r in range(2)]
    assert len({tuple(d) for d in drawn}) > 3
    assert make("random", 3).block_order(1) == make("random", 3).block_order(1)


def test_a_step_outside_the_run_is_refused():
    with pytest.raises(IndexError):
        Schedule(1, 2, 3).step(6)


def test_the_learning_rate_warms_up_and_then_stays_or_falls_as_its_schedule_says():
    constant = [learning_rate(i, 10, peak=2.0, warmup_steps=4) for i in range(10)]
    assert constant == [0.5, 1.0, 1.5, 2.0] + [2.0] * 6
    linear = [learning_rate(i, 10, peak=1.0, schedule="linear", final_ratio=0.5) for i in range(11)]
    assert linear[0] == 1.0 and linear[10] == 0.5 and math.isclose(linear[5], 0.75)
    cosine = [learning_rate(i, 10, peak=1.0, schedule="cosine") for i in range(11)]
    assert cosine[0] == 1.0 and math.isclose(cosine[5], 0.5) and abs(cosine[10]) < 1e-12
    assert learning_rate(0, 1, peak=1.0, schedule="linear") == 1.0
    with pytest.raises(ValueError, match="'step'"):
        learning_rate(0, 10, peak=1.0, schedule="step")


@pytest.mark.parametrize("warmup", [0, 3])
def test_every_step_has_the_learning_rate_that_transformers_gives_and_none_is_wasted(warmup):
    """After the warm-up, which begins at 0 there."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    for name in ("linear", "cosine"):
        scheduler = get_scheduler(name, torch.optim.SGD([parameter], lr=0.5), warmup, 11)
        for index in range(11):
            ours = learning_rate(index, 11, peak=0.5, schedule=name, warmup_steps=warmup)
            assert ours > 0
            if index >= warmup:
                assert math.isclose(ours, scheduler.get_last_lr()[0], rel_tol=1e-12)
            scheduler.optimizer.step()
            scheduler.step()

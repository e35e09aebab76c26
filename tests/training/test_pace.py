"""When a run ends, from the pace of its blocks and its evaluations."""

from collections import Counter

import pytest

from deca_ds.algorithm.schedule import Schedule
from deca_ds.training.pace import Pace, duration, evaluates, evaluations_left, pace_from


def test_blocks_have_their_own_pace_and_evaluations_count():
    pace = Pace(Counter({0: 10, 1: 10}), evaluations=3)
    assert pace.left_s is None and pace.loss is None and pace.tokens_per_second is None
    pace.evaluated(7.0)
    pace.step(0, 1.0, loss=2.0, tokens=300)
    assert pace.left_s == pytest.approx(9 * 1.0 + 10 * 1.0 + 2 * 7.0), "an unknown block is as fast as the others"
    pace.step(1, 3.0, loss=4.0, tokens=500)
    assert pace.left_s == pytest.approx(9 * 1.0 + 9 * 3.0 + 2 * 7.0)
    assert pace.loss == 3.0 and pace.tokens_per_second == pytest.approx(200)


def test_the_slow_first_step_and_old_losses_are_forgotten():
    pace = Pace(Counter({0: 1000}), evaluations=0)
    pace.step(0, 100.0, loss=50.0, tokens=1)
    for _ in range(400):
        pace.step(0, 1.0, loss=1.0, tokens=10)
    assert pace.left_s == pytest.approx(599.0, rel=0.01) and pace.loss == 1.0 and pace.tokens_per_second == 10


@pytest.mark.parametrize("every", [0, 1, 5, 7, 24, 100])
@pytest.mark.parametrize("done", [0, 1, 5, 23, 24])
def test_the_evaluations_left_are_those_that_the_loop_will_make(done, every):
    assert evaluations_left(done, 24, every) == sum(evaluates(step, 24, every) for step in range(done, 25))


@pytest.mark.parametrize("done", [0, 3, 8, 17, 24])
@pytest.mark.parametrize("blocks", [1, 3])
def test_a_resumed_run_knows_what_is_left_of_each_block(done, blocks):
    schedule = Schedule(rounds=2, blocks=blocks, inner_steps=12 // blocks, order="random")
    left = Counter(step.block for step in schedule if step.index >= done)
    pace = pace_from(schedule, done, every=0)
    for block in range(blocks):  # the seconds of each block's step are a digit of those that are left
        pace.step(block, 100.0**block, loss=1.0, tokens=10)
        left[block] -= 1
    assert pace.left_s == sum(100.0**block * steps for block, steps in left.items())


@pytest.mark.parametrize(
    ("seconds", "said"), [(7.4, "0:07"), (760, "12:40"), (11100, "3:05:00"), (2 * 86400 + 3 * 3600 + 9, "2 days 3 h")]
)
def test_durations_are_told_in_the_units_that_matter(seconds, said):
    assert duration(seconds) == said

"""The best evaluation so far, and when a run gives up."""

from __future__ import annotations

from deca_ds.training.best import after, gives_up, is_better


def test_the_first_of_equal_losses_is_the_best_and_others_are_counted():
    best, seen = {}, []
    for step, loss in enumerate([3.0, 2.0, 2.5, 2.0, 1.0, 1.0]):
        seen.append(is_better(best, loss))
        best = after(best, step, loss)
    assert seen == [True, True, False, False, True, False]
    assert best == {"step": 4, "loss": 1.0, "since": 1}


def test_a_run_gives_up_after_as_many_evaluations_as_it_has_patience_for():
    best = after({}, 0, 1.0)
    for since in range(1, 4):
        best = after(best, since, 1.0 + since)
        assert [gives_up(best, patience) for patience in (0, 1, 2, 3, 4)] == [
            False, since >= 1, since >= 2, since >= 3, False,
        ]  # fmt: skip

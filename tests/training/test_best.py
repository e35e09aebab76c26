"""The best evaluation so far, and when a run gives up."""

from __future__ import annotations

from deca_ds.training.best import after, gives_up, is_better


def test_the_first_of_equal_losses_is_the_best_and_others_are_counted():
    best, seen = {}, []
    for step, loss in enumerate([3.0, 2.0, 2.5, 2.0, 1.0, 1.0]):
        seen.append(is_better(best, loss, []))
        best = after(best, step, loss, [])
    assert seen == [True, True, False, False, True, False]
    assert best == {"step": 4, "loss": 1.0, "sets": [], "since": 1}


def test_losses_on_the_sets_of_other_clients_are_not_compared():
    """With fewer clients the pooled loss is of fewer examples, whatever the models are."""
    best = after(after({}, 0, 1.0, [0, 1, 2]), 1, 2.0, [0, 1, 2])
    assert best["since"] == 1
    best = after(best, 2, 3.0, [0, 2])
    assert best == {"step": 2, "loss": 3.0, "sets": [0, 2], "since": 0}
    assert not is_better(best, 3.0, [0, 2]) and is_better(best, 2.5, [0, 2])


def test_a_state_of_an_earlier_version_is_taken_for_one_of_the_same_sets():
    assert not is_better({"step": 4, "loss": 1.0, "since": 1}, 1.5, [0, 1])


def test_a_run_gives_up_after_as_many_evaluations_as_it_has_patience_for():
    best = after({}, 0, 1.0, [0, 1])
    for since in range(1, 4):
        best = after(best, since, 1.0 + since, [0, 1])
        assert [gives_up(best, patience) for patience in (0, 1, 2, 3, 4)] == [
            False, since >= 1, since >= 2, since >= 3, False,
        ]  # fmt: skip

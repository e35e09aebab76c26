"""Which evaluation has found the lowest loss so far, and how many have come since. All ranks of all clients know the
same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# step, loss, sets: of the best evaluation, see Evaluation; since: how many came after it; empty before the first
State = Mapping[str, Any]


def is_better(best: State, loss: float, sets: Sequence[int]) -> bool:
    """Return whether an evaluation with this loss is the best so far. The first on other sets always is: losses of
    different examples tell nothing about models, so the search begins anew."""
    return not best or list(best.get("sets", sets)) != list(sets) or loss < float(best["loss"])


def after(best: State, step: int, loss: float, sets: Sequence[int]) -> dict[str, Any]:
    """Return what `best` becomes by an evaluation after `step` inner steps."""
    if is_better(best, loss, sets):
        return {"step": step, "loss": loss, "sets": list(sets), "since": 0}
    return {**best, "since": best["since"] + 1}


def gives_up(best: State, patience: int) -> bool:
    """Return whether a run stops early. patience: evaluation.patience."""
    return 0 < patience <= int(best.get("since", 0))


def is_saved(best: State) -> bool:
    """Return whether `checkpoint.best` has saved the best model so far: not if that is the one from before training."""
    return bool(best.get("step"))

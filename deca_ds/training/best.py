"""Which evaluation has found the lowest loss so far, and how many have come since. All ranks of all clients know the
same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

State = Mapping[str, Any]  # step, loss: of the best evaluation; since: how many came after it; empty before the first


def is_better(best: State, loss: float) -> bool:
    """Whether an evaluation with this loss is the best so far."""
    return not best or loss < float(best["loss"])


def after(best: State, step: int, loss: float) -> dict[str, Any]:
    """What `best` becomes by an evaluation after `step` inner steps."""
    if is_better(best, loss):
        return {"step": step, "loss": loss, "since": 0}
    return {**best, "since": best["since"] + 1}


def gives_up(best: State, patience: int) -> bool:
    """Whether a run stops early. patience: evaluation.patience."""
    return 0 < patience <= int(best.get("since", 0))

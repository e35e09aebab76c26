"""How the schema declares a key, and which values it may have."""

from __future__ import annotations

import copy
import datetime
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Allowed:
    """Values that a key may have. holds: whether one does. words: what a value must be, after "make it"."""

    holds: Callable[[Any], bool]
    words: str


def at_least(least: float) -> Allowed:
    """Allow `least` or more."""
    return Allowed(lambda x: x >= least, f"at least {least:g}")


def more_than(bound: float) -> Allowed:
    """Allow more than `bound`."""
    return Allowed(lambda x: x > bound, f"more than {bound:g}")


def inside(interval: str, why: str = "") -> Allowed:
    """Allow an interval as mathematics writes it: "[0, 1)" has 0 and not 1. why: for messages."""
    low, high = map(float, interval[1:-1].split(","))
    above = operator.ge if interval[0] == "[" else operator.gt
    below = operator.le if interval[-1] == "]" else operator.lt
    return Allowed(lambda x: above(x, low) and below(x, high), f"in {interval}" + f": {why}" * bool(why))


def or_null(allowed: Allowed) -> Allowed:
    """Allow these, or null."""
    return Allowed(lambda x: x is None or allowed.holds(x), f"null or {allowed.words}")


def _is_day(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


DAY = Allowed(_is_day, "a day, YYYY-MM-DD")


def key(default: Any, meaning: str, see: str | None = None, *, allowed: Allowed | None = None) -> Any:
    """Declare a configuration key.

    meaning: one sentence for the reference and for error messages. see: the page in docs/ that tells more, or
    page.md#section. allowed: which values of its type it may have; None: all.
    """
    metadata = {"meaning": meaning, "see": see, "allowed": allowed}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)

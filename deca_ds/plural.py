"""Counts in words, for people."""

from __future__ import annotations

from collections.abc import Iterable


def several(number: int, noun: str) -> str:
    """Write a number with its noun: 1 client, 3 clients. noun: in the singular, one that takes an s."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def first_few(names: Iterable[object], most: int, between: str = ", ") -> str:
    """Name the first `most`, and how many more there are: a, b and 3 more."""
    every = list(map(str, names))
    return between.join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")

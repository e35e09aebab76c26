"""Counts and lists in words, for people."""

from __future__ import annotations

from collections.abc import Iterable


def several(number: int, noun: str) -> str:
    """Write a number with its noun: 1 client, 3 clients. noun: in the singular, one that takes an s."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def named(noun: str, names: Iterable[object], most: int | None = None) -> str:
    """Name each of some: client 3, clients 3, 4. noun: as for `several`. most: see `first_few`; all by default."""
    every = list(names)
    return f"{noun}{'' if len(every) == 1 else 's'} {first_few(every, len(every) if most is None else most)}"


def first_few(names: Iterable[object], most: int, between: str = ", ") -> str:
    """Name the first `most`, and how many more there are: a, b and 3 more."""
    every = list(map(str, names))
    return between.join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")

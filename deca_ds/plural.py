"""Numbers with their nouns, for people."""

from __future__ import annotations


def several(number: int, noun: str) -> str:
    """Write a number with its noun: 1 client, 3 clients. noun: in the singular, one that takes an s."""
    return f"{number} {noun}{'' if number == 1 else 's'}"

"""JSON in which no object has two values under one name: the json module would keep the last one without a word."""

from __future__ import annotations

import json
from typing import Any


def parse(text: str) -> Any:
    """What `text` holds. Raises ValueError where it is no JSON, or an object in it names one of its values twice."""
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in made if names.count(name) > 1)
        raise ValueError(f"an object has two values named {twice!r}")
    return made

"""How the schema declares a key."""

from __future__ import annotations

import copy
from dataclasses import field
from typing import Any


def key(default: Any, meaning: str, see: str | None = None) -> Any:
    """A configuration key.

    meaning: one sentence for the reference and for error messages. see: the page in docs/ that tells more, or
    page.md#section.
    """
    metadata = {"meaning": meaning, "see": see}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)

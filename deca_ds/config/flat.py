"""A configuration's values by `section.key`, without the sections around them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from deca_ds.config.schema import Config


def flat(config: Config) -> dict[str, Any]:
    """Return the value of every key, by section.key."""
    return flatten(asdict(config))


def flatten(sections: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the values of a configuration as YAML has it, by section.key. A value that is no section keeps its
    name."""
    found: dict[str, Any] = {}
    for section, values in sections.items():
        if isinstance(values, Mapping):
            found |= {f"{section}.{key}": value for key, value in values.items()}
        else:
            found[str(section)] = values
    return found

"""The configuration: schema, loading, cross-field checks, and the resolved copy that is saved with a run."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deca_ds.config.load import Given, load_config, save_config
    from deca_ds.config.schema import Config

__all__ = ["Config", "Given", "load_config", "save_config"]


def __getattr__(name: str) -> Any:  # what reads YAML is imported when it is asked for: `deca status` does without
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{'schema' if name == 'Config' else 'load'}"), name)

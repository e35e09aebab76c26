"""Decentralized block-wise Adam (DECA) for full-parameter fine-tuning on DeepSpeed ZeRO-3 clients."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from deca_ds.watchdog import started_by as _started_by  # noqa: F401  # notes what may be gone a moment later

if TYPE_CHECKING:
    from deca_ds.config import Config, load_config
    from deca_ds.errors import UserError
    from deca_ds.simulation.run import simulate
    from deca_ds.tools.train import train
    from deca_ds.training.scores import RunResult

__version__ = "0.1.0"
__all__ = ["Config", "RunResult", "UserError", "load_config", "simulate", "train"]

_MODULES = {  # imported when they are asked for: the commands that look at files do without torch
    "Config": "config",
    "RunResult": "training.scores",
    "UserError": "errors",
    "load_config": "config",
    "simulate": "simulation.run",
    "train": "tools.train",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

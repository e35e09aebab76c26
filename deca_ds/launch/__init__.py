"""Who am I, and who else is in: launchers, ranks and clients, the view, the job's store, one torch world per client.

The names below are imported when they are asked for: world.py needs torch, and what only reads a run's folder does not.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deca_ds.launch.launcher import ClientLayout, Launch, read_launch
    from deca_ds.launch.world import Cluster, connect
else:
    _HOMES = {"ClientLayout": "launcher", "Launch": "launcher", "read_launch": "launcher"}
    _HOMES |= {"Cluster": "world", "connect": "world"}

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


__all__ = ["ClientLayout", "Cluster", "Launch", "connect", "read_launch"]

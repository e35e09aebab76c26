"""Who am I, and who else is in: launchers, ranks and clients, the view, the job's store, one torch world per client."""

from deca_ds.launch.launcher import ClientLayout, Launch, read_launch
from deca_ds.launch.world import Cluster, connect

__all__ = ["ClientLayout", "Cluster", "Launch", "connect", "read_launch"]

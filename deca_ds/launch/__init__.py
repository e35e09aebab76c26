"""Who am I: the launcher's environment, ranks and clients, the job's store, and one torch world per client."""

from deca_ds.launch.launcher import ClientLayout, Launch, read_launch
from deca_ds.launch.world import Cluster, connect

__all__ = ["ClientLayout", "Cluster", "Launch", "connect", "read_launch"]

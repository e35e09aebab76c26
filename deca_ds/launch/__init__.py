"""Who am I, and who else is in: launchers, ranks and clients, the view, the job's store, one torch world per client.

All else is imported from its module: most of these need torch, and what only reads a run's folder does not.
"""

from deca_ds.launch.launcher import ClientLayout, Launch, read_launch

__all__ = ["ClientLayout", "Launch", "read_launch"]

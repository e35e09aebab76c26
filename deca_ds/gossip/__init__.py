"""Decentralized averaging: graphs and weights, the schedule of mixing, and the averaging itself.

What averages is imported from its module: it needs torch, and what only asks who averages with whom does not.
"""

from deca_ds.gossip.schedule import MixingSchedule, build_mixing
from deca_ds.gossip.theory import agreement, slow_mixing

__all__ = ["MixingSchedule", "agreement", "build_mixing", "slow_mixing"]

"""Decentralized averaging: graphs and weights, the schedule of mixing, and the averaging itself."""

from deca_ds.gossip.averaging import Mean
from deca_ds.gossip.clip import Clip, clipped_weights
from deca_ds.gossip.codec import CODECS
from deca_ds.gossip.gossip import Gossip
from deca_ds.gossip.late import check_wait
from deca_ds.gossip.schedule import MixingSchedule, build_mixing
from deca_ds.gossip.stragglers import LateExchange
from deca_ds.gossip.strategies import WINDOW, begin
from deca_ds.gossip.theory import agreement, large_momentum, slow_mixing

__all__ = [
    "CODECS",
    "WINDOW",
    "Clip",
    "Gossip",
    "LateExchange",
    "Mean",
    "MixingSchedule",
    "agreement",
    "begin",
    "build_mixing",
    "check_wait",
    "clipped_weights",
    "large_momentum",
    "slow_mixing",
]

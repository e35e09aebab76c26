"""What the job does about who is in: every case."""

from __future__ import annotations

from itertools import product

import pytest

from deca_ds.config.schema import ClusterConfig, GossipConfig
from deca_ds.elastic.policy import Action, Situation, Verdict, check_absent, decide
from deca_ds.errors import ConfigError
from deca_ds.gossip.schedule import build_mixing
from deca_ds.launch.view import View

WHOLE, TORN = [[0, 2, 3]], [[0], [2, 3]]
VIEW = View(5, (2, 3, 0), 5)  # client 0 has come back
GOES_ON = Verdict(Action.CONTINUE)
REUNITES = Verdict(Action.REJOIN, "the larger part of the network is in reach again: clients 0, 2, 3 will rejoin it")
TOO_FEW = "3 of 5 are left, fewer than cluster.min_clients: stopping"
STOPS = Verdict(Action.STOP, "[0] and [2, 3] do not reach each other any more: stopping")
PARTS = Verdict(Action.CONTINUE, "[0] and [2, 3] do not reach each other any more: each part continues by itself")


def config(min_clients: int, on_partition: str, return_s: float) -> ClusterConfig:
    return ClusterConfig(clients=5, min_clients=min_clients, on_partition=on_partition, return_s=return_s)


@pytest.mark.parametrize(("on_partition", "return_s"), product(["stop", "continue"], [0.0, 60.0]))
def test_the_policy_continues_stops_rejoins_or_reunites_in_every_case(on_partition, return_s):
    enough, few = config(3, on_partition, return_s), config(4, on_partition, return_s)
    assert decide(Situation(VIEW, WHOLE), enough) == GOES_ON
    assert decide(Situation(VIEW, TORN), enough) == (STOPS if on_partition == "stop" else PARTS)
    for parts in (WHOLE, TORN):
        verdict = Verdict(Action.REJOIN if return_s else Action.STOP, TOO_FEW)
        assert decide(Situation(VIEW, parts), few) == verdict, "also where the graph is torn"
        for cluster in (enough, few):
            assert decide(Situation(VIEW, parts, larger_part=True), cluster) == REUNITES


def test_absent_clients_that_join_the_others_are_refused_unless_parts_continue():
    star = build_mixing(GossipConfig(graph="star"), 3, 0)
    with pytest.raises(ConfigError, match=r"the graph falls into \[1\] and \[2\]"):
        check_absent(ClusterConfig(clients=3, absent=[0]), star)
    check_absent(ClusterConfig(clients=3, absent=[0], on_partition="continue"), star)
    check_absent(ClusterConfig(clients=3, absent=[1]), star)
    isolated = build_mixing(GossipConfig(graph="isolated"), 3, 0)
    check_absent(ClusterConfig(clients=3), isolated)  # where all are there, the graph is meant so


def test_one_client_that_reunites_is_named_as_one():
    verdict = decide(Situation(View(1, (4,), 5), [[4]], larger_part=True), config(1, "continue", 60.0))
    assert verdict.why.endswith("in reach again: client 4 will rejoin it")

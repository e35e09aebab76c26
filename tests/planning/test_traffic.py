"""Traffic of runs against what the schedule and the graph say step by step."""

import pytest

from deca_ds.algorithm.schedule import Schedule
from deca_ds.config.schema import GossipConfig
from deca_ds.gossip.schedule import build_mixing
from deca_ds.planning.traffic import traffic


@pytest.mark.parametrize(("graph", "clients"), [("ring", 4), ("star", 5), ("one_peer_exponential", 4), ("isolated", 3)])
@pytest.mark.parametrize(("blocks", "every"), [((10, 40, 30), 1), ((10, 40, 30), 3), ((50,), 4)])
def test_traffic_is_the_sum_over_all_steps(graph, clients, blocks, every):
    schedule = Schedule(rounds=12, blocks=len(blocks), inner_steps=5, gossip_every=every)
    mixing = build_mixing(GossipConfig(graph=graph), clients, 0)
    sent = [0.0] * clients
    edge = 0
    for step in schedule:
        if step.gossip is not None:
            edge += blocks[step.block]
            for client in range(clients):
                sent[client] += blocks[step.block] * len(mixing.destinations(client, step.gossip))
    found = traffic(blocks, schedule, mixing)
    assert found.averaging == max(blocks)
    assert found.edge == pytest.approx(edge / len(schedule))
    # where the graph changes, its matrices meet blocks of different sizes; over a run that evens out
    assert found.run == pytest.approx(sum(sent), rel=0.02)
    assert found.run_client == pytest.approx(max(sent), rel=0.02)
    assert found.client == pytest.approx(found.run_client / len(schedule))

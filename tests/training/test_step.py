"""Where the averaging of an inner step ends: everything has been sent before, and nothing is changed until then."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from deca_ds.algorithm.deca import DecaRule
from deca_ds.algorithm.local import LocalSteps
from deca_ds.algorithm.schedule import Schedule
from deca_ds.config.schema import GossipConfig, OptimizerConfig
from deca_ds.engine.client import BlockState
from deca_ds.gossip.gossip import Gossip
from deca_ds.gossip.schedule import build_mixing
from deca_ds.training.step import at_once, inner_step
from deca_ds.transport.local import LocalNetwork

NUMEL, LR = 40, 1e-2


class Client:
    """One of one rank, with a gradient of its own."""

    def __init__(self, number: int):
        rule, draw = DecaRule(), torch.Generator().manual_seed(number)
        tensors = {name: torch.zeros(NUMEL) for name in ("theta", "grad", *rule.buffers)}
        tensors["theta"].normal_(generator=draw)
        self.state = BlockState(None, tensors, ("w",), LocalSteps([NUMEL], [True]), [True])
        self.written = 0
        self._draw = draw

    def gradient(self, micro_batches, clip_norm, tick):
        self.state.grad.normal_(generator=self._draw)
        return SimpleNamespace(loss=1.0)

    def block_numels(self):
        return [NUMEL]

    def client_sum(self, value):
        return value

    def write_back(self):
        self.written += 1


@pytest.mark.parametrize("chunk_elements", [NUMEL, 16])
def test_a_boundary_decides_when_an_averaging_ends_and_not_what_comes_of_it(chunk_elements):
    mixing, step = build_mixing(GossipConfig(), 2, seed=0), Schedule(rounds=1, blocks=1, inner_steps=1).step(0)

    def train(client: Client, transport, boundary) -> torch.Tensor:
        gossip, rule = Gossip(transport, mixing, 4 * chunk_elements / 2**20), DecaRule()
        rule.open(client.state.tensors)
        inner_step(client, client.state, rule, gossip, step, [], LR, OptimizerConfig(), boundary=boundary)
        return client.state.theta

    def run(boundary) -> list[torch.Tensor]:
        network = LocalNetwork(2, 100.0)
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda c: train(Client(c), network.transport(c), boundary), range(2)))

    expected = run(at_once)

    network, clients = LocalNetwork(2, 100.0), [Client(0), Client(1)]
    ends = []
    for number, client in enumerate(clients):  # one after the other: neither waits for the other before its end
        train(client, network.transport(number), ends.append)
        assert client.written == 0
    assert not torch.equal(clients[0].state.theta, expected[0])
    for end in ends:
        end()
    assert [client.written for client in clients] == [1, 1]
    assert all(map(torch.equal, [client.state.theta for client in clients], expected))

"""A client's state, handed to one of another size or of the same: whole, checked, and again when the giver is lost."""

from __future__ import annotations

import pytest
import torch
from fake_clients import in_threads, tensors_of, training_state

from deca_ds.elastic import handover
from deca_ds.elastic.handover import receive, send
from deca_ds.engine.state import TrainingState
from deca_ds.errors import GossipError, MessageError
from deca_ds.launch.launcher import ClientLayout
from deca_ds.transport.local import LocalNetwork, LocalTransport


def state_of(layout: ClientLayout, number: int, done: int) -> TrainingState:
    """Of rank `number` of the job, whose values are its client's."""
    client = layout.client_of(number)
    return training_state(len(layout.ranks_of(client)), layout.shard_of(number), client, done)


def assert_handed_over(state: TrainingState, layout: ClientLayout, number: int, giver: int, done: int) -> None:
    """Whether rank `number` has what it would have if it were one of client `giver`."""
    ranks = len(layout.ranks_of(layout.client_of(number)))
    expected = training_state(ranks, layout.shard_of(number), giver, done)
    got, given = tensors_of(state), tensors_of(expected)
    assert got.keys() == given.keys()
    for name, values in got.items():
        assert values.dtype == given[name].dtype and torch.equal(values, given[name]), name
    steps = [None if s.client.active is None else s.client.active.local_steps.made for s in (state, expected)]
    assert state.done == done and steps[0] == steps[1]


@pytest.mark.parametrize("sizes", [(2, 2), (1, 2), (3, 2), (2, 5), (4, 1), (1, 1)])
@pytest.mark.parametrize("done", [3, 5])
def test_everything_comes_over_whatever_the_sizes(sizes, done, monkeypatch):
    """done: within a block, and between two."""
    monkeypatch.setattr(handover, "_MESSAGE", 4)
    layout = ClientLayout.of(sizes)
    network = LocalNetwork(sizes, 100.0)

    def body(number: int):
        gives = layout.client_of(number) == 0
        state, way = state_of(layout, number, done if gives else 0), network.transport(number)
        if gives:
            state.stopping = True
            send(way, 1, state)
        else:
            receive(way, 0, state)
            assert state.stopping
            assert_handed_over(state, layout, number, 0, done)

    in_threads(range(sum(sizes)), body)


@pytest.mark.parametrize("giver", [1, 2])
def test_when_the_giver_is_lost_during_a_handover_another_one_of_another_size_begins_anew(giver):
    """Client 0 is lost after half of its messages; the block that client 3 has opened stays open."""
    sizes = (2, 1, 3, 2)
    layout, before, after = ClientLayout.of(sizes), LocalNetwork(sizes, 0.3), LocalNetwork(sizes, 100.0)

    def body(number: int):
        client = layout.client_of(number)
        state = state_of(layout, number, 0 if client == 3 else 3)
        if client == 0:
            lost = before.transport(number)
            exchange, started = lost.exchange, []

            def until_it_is_lost(*message):
                started.append(message)
                if len(started) > 6:
                    raise MessageError("lost")
                return exchange(*message)

            lost.exchange = until_it_is_lost
            with pytest.raises(MessageError):
                send(lost, 3, state)
        elif client == 3:
            with pytest.raises(MessageError, match="no message from rank"):
                receive(before.transport(number), 0, state)
            assert state.client.active is not None
            receive(after.transport(number), giver, state)
            assert_handed_over(state, layout, number, giver, 3)
        elif client == giver:
            send(after.transport(number), 3, state)

    in_threads(range(8), body)


@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (1, 2), (2, 3)])
def test_a_damaged_slice_is_noticed_by_whoever_gets_it(sizes, monkeypatch):
    """Of the first client's last rank, an element of the block's masters changes on its way."""
    layout = ClientLayout.of(sizes)
    network, deliver = LocalNetwork(sizes, 100.0), LocalTransport._exchange
    at = sizes[0] - 1

    def damaging(self, to_send, destinations, receives, tag):
        if self.rank == at and destinations and to_send.dtype == torch.float32 and to_send.numel() > 1:
            to_send = to_send.clone()
            to_send[-1] += to_send[-1] > 3000
        return deliver(self, to_send, destinations, receives, tag)

    monkeypatch.setattr(LocalTransport, "_exchange", damaging)

    def body(number: int) -> str:
        gives = layout.client_of(number) == 0
        state, way = state_of(layout, number, 3 if gives else 0), network.transport(number)
        try:
            if gives:
                send(way, 1, state)
            else:
                receive(way, 0, state)
        except GossipError as error:
            return str(error)
        return ""

    told = in_threads(range(sum(sizes)), body)
    assert not any(told[: sizes[0]])
    assert "what arrived is not what client 0 handed over" in told[-1] and "where: client 1" in told[-1]

"""A client's state, handed to one of another size or of the same: whole, checked, and again when the giver is lost."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from math import prod
from types import SimpleNamespace

import pytest
import torch

from deca_ds.algorithm.local import LocalSteps
from deca_ds.algorithm.schedule import Schedule
from deca_ds.elastic import handover
from deca_ds.elastic.handover import Progressed, receive, send
from deca_ds.errors import GossipError, MessageError
from deca_ds.launch.launcher import ClientLayout
from deca_ds.transport.intersections import held
from deca_ds.transport.local import LocalNetwork, LocalTransport

# no size divides them, and some ranks hold nothing of some
SHAPES = {"a": (7, 3), "b": (2,), "c": (1,), "frozen": (13,)}
BLOCK, SCHEDULE = ("a", "c"), Schedule(rounds=2, blocks=2, inner_steps=5)
RULE = SimpleNamespace(buffers=("m",))


class Active(dict):
    """The tensors of the open block, by key and name, and the steps that its parameters have made."""

    local_steps: LocalSteps


class Rank:
    """One rank's slices of a client whose values are all different. of: whose values they are, if not its own."""

    def __init__(self, layout: ClientLayout, rank: int, open_block: bool = True, of: int | None = None):
        self.client = layout.client_of(rank)
        self._of, self._again = (
            self.client if of is None else of,
            lambda of: Rank(layout, rank, self.active is not None, of),
        )
        self._ranks, self._shard = len(layout.ranks_of(self.client)), layout.shard_of(rank)
        self.shapes, self.active = SHAPES, None
        self.plan = SimpleNamespace(blocks=[SimpleNamespace(names=("a", "b", "c"))], frozen=("frozen",))
        self._model = {name: self._slice(name, 100 * place) for place, name in enumerate(SHAPES)}
        self._model["frozen"] = self._model["frozen"].to(torch.bfloat16)
        self._low = {name: self._slice(name, 7 + place).to(torch.int16) for place, name in enumerate("abc")}
        self._buffers = {"table": torch.arange(6.0).view(2, 3) + self._of, "count": torch.tensor(self._of)}
        if open_block:
            self.open_block(0, RULE.buffers)
            for place, key in enumerate(self.active):
                for name in BLOCK:
                    self.active[key][name] = self._slice(name, 10000 * (1 + place))
            self.active.local_steps.made = [3, self._of]

    def _slice(self, name: str, offset: int) -> torch.Tensor:
        numel = prod(SHAPES[name])
        whole = torch.arange(float(numel)) + offset + 1000 * self._of
        return torch.cat([whole[:0], *(whole[a:b] for a, b in held([numel], self._ranks, self._shard))]).clone()

    def open_block(self, index: int, buffers: tuple[str, ...]) -> dict:
        empty = {name: torch.zeros_like(self._model[name]) for name in BLOCK}
        self.active = Active({key: {n: v.clone() for n, v in empty.items()} for key in ("theta", "grad", *buffers)})
        self.active.local_steps = LocalSteps([v.numel() for v in empty.values()], [True, False])
        return self.active

    def shards(self, names):
        return ((name, None, None, self._model[name]) for name in names)

    def low_bits(self, names):
        return ((name, None, self._low[name]) for name in names if name in self._low)

    def block_shards(self):
        for name in BLOCK if self.active is not None else ():
            yield name, None, None, {key: values[name] for key, values in self.active.items()}

    def buffers(self):
        return iter(self._buffers.items())

    def state(self) -> list[torch.Tensor]:
        block = [tensors[key] for _, _, _, tensors in self.block_shards() for key in ("theta", "m")]
        block += [torch.tensor(self.active.local_steps.made)] if self.active is not None else []
        return [*self._model.values(), *self._low.values(), *block, *self._buffers.values()]

    def assert_has_the_state_of(self, giver: int) -> None:
        for values, expected in zip(self.state(), self._again(giver).state(), strict=True):
            assert values.dtype == expected.dtype and torch.equal(values, expected)


def in_threads(ranks, body):
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(body, ranks))


@pytest.mark.parametrize("sizes", [(2, 2), (1, 2), (3, 2), (2, 5), (4, 1), (1, 1)])
@pytest.mark.parametrize("done", [3, 5])
def test_everything_comes_over_whatever_the_sizes(sizes, done, monkeypatch):
    """done: within a block, and between two."""
    monkeypatch.setattr(handover, "_PIECE", 4)
    layout = ClientLayout.of(sizes)
    network, inside = LocalNetwork(sizes, 20.0), bool(SCHEDULE.step(done).inner)

    def body(number: int):
        rank = Rank(layout, number, inside and number < sizes[0])
        way = network.transport(number)
        if rank.client == 0:
            send(way, 1, rank, Progressed(done, True, rank.active))
        else:
            standing = receive(way, 0, rank, RULE, SCHEDULE)
            assert (standing.done, standing.stopping, standing.state) == (done, True, rank.active)
            assert (rank.active is not None) == inside
            rank.assert_has_the_state_of(0)

    in_threads(range(sum(sizes)), body)


@pytest.mark.parametrize("giver", [1, 2])
def test_when_the_giver_is_lost_amid_it_another_one_of_another_size_begins_anew(giver):
    """Client 0 is lost after half of its messages; the block that client 3 has opened stays open."""
    sizes = (2, 1, 3, 2)
    layout, before, after = ClientLayout.of(sizes), LocalNetwork(sizes, 0.3), LocalNetwork(sizes, 20.0)

    def body(number: int):
        rank = Rank(layout, number, layout.client_of(number) != 3)
        if rank.client == 0:
            lost = before.transport(number)
            exchange, started = lost.exchange, []

            def until_it_is_lost(*message):
                started.append(message)
                if len(started) > 6:
                    raise MessageError("lost")
                return exchange(*message)

            lost.exchange = until_it_is_lost
            with pytest.raises(MessageError):
                send(lost, 3, rank, Progressed(3, False, rank.active))
        elif rank.client == 3:
            with pytest.raises(MessageError, match="no message from rank"):
                receive(before.transport(number), 0, rank, RULE, SCHEDULE)
            receive(after.transport(number), giver, rank, RULE, SCHEDULE)
            rank.assert_has_the_state_of(giver)
        elif rank.client == giver:
            send(after.transport(number), 3, rank, Progressed(3, False, rank.active))

    in_threads(range(8), body)


@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (1, 2), (2, 3)])
def test_a_damaged_slice_is_noticed_by_whoever_gets_it(sizes, monkeypatch):
    """Of the first client's last rank, an element of the block's masters changes on its way."""
    layout = ClientLayout.of(sizes)
    network, deliver = LocalNetwork(sizes, 20.0), LocalTransport._exchange
    at = sizes[0] - 1

    def damaging(self, to_send, destinations, receives, tag):
        if self.rank == at and destinations and to_send.dtype == torch.float32 and to_send.numel() > 1:
            to_send = to_send.clone()
            to_send[-1] += to_send[-1] > 10000
        return deliver(self, to_send, destinations, receives, tag)

    monkeypatch.setattr(LocalTransport, "_exchange", damaging)

    def body(number: int) -> str:
        rank = Rank(layout, number, number < sizes[0])
        way = network.transport(number)
        try:
            if rank.client == 0:
                send(way, 1, rank, Progressed(3, False, rank.active))
            else:
                receive(way, 0, rank, RULE, SCHEDULE)
        except GossipError as error:
            return str(error)
        return ""

    told = in_threads(range(sum(sizes)), body)
    assert not any(told[: sizes[0]])
    assert "what client 0 handed over is not what arrived" in told[-1] and "where: client 1" in told[-1]

"""What every codec keeps to, alone and in every kind of averaging: the dense equation, and the mean of all clients."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from dense_reference import average
from gossip_worker import mix
from hypothesis import given
from hypothesis import strategies as st
from rounding import UNIT
from torch.distributed import HashStore, PrefixStore, Store

from deca_ds.config.schema import Config, GossipConfig
from deca_ds.errors import ConfigError, GossipError
from deca_ds.gossip.clip import Clip
from deca_ds.gossip.codec import CODECS
from deca_ds.gossip.gossip import Gossip
from deca_ds.gossip.late_exchange import LateExchange
from deca_ds.gossip.schedule import build_mixing
from deca_ds.gossip.strategies import begin
from deca_ds.simulation.averaging import means_of
from deca_ds.training.chosen_method import check_method
from deca_ds.transport.commit import Commit
from deca_ds.transport.local import LocalNetwork, LocalTransport

CLIENTS, NUMEL, CHUNK_MIB, RADIUS = 4, 1000, 0.0005, 20.0
every_codec = pytest.mark.parametrize("wire", CODECS)


def values(scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(CLIENTS, NUMEL, generator=torch.Generator().manual_seed(7))


def test_every_codec_can_be_chosen_and_no_other():
    for wire in CODECS:
        check_method(Config(gossip=GossipConfig(wire=wire)))
    with pytest.raises(ConfigError, match=r"(?s)gossip\.wire = 'no-codec'.*one of float32, bfloat16"):
        check_method(Config(gossip=GossipConfig(wire="no-codec")))


@every_codec
@given(x=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20))
def test_a_codec_works_element_by_element_and_loses_nothing_the_second_time(wire, x):
    codec, x = CODECS[wire], torch.tensor(x)
    sent = torch.empty(len(x), dtype=codec.dtype)
    codec.encode(x, sent)
    coded = codec.coded(x)
    assert coded.dtype == torch.float32 and sent.nbytes == codec.bytes * len(x)
    assert same(codec.decode(sent), coded)
    assert same(torch.cat([codec.coded(element) for element in x.split(1)]), coded)
    assert same(codec.coded(coded), coded)
    assert torch.equal(coded, x) or not codec.exact


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Value by value; NaN, which a codec may make of a value that is too large for it, is NaN."""
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


@every_codec
def test_what_is_not_finite_stays_so(wire):
    assert not CODECS[wire].coded(torch.tensor([torch.nan, torch.inf, -torch.inf])).isfinite().any()


def test_bfloat16_rounds_to_eight_bits():
    x = values()
    error = (CODECS["bfloat16"].coded(x) - x).abs() / x.abs()
    assert 2**-9 < float(error.max()) <= 2**-8


class Again(Commit):
    """Everything is found not to count, once, and done again on new connections."""

    may_repeat = True

    def __init__(self, transport: LocalTransport):
        self._transport = transport

    def run(self, work, *, last=False):
        work()
        self._transport.epoch += 1
        return work()


def options(kind: str, transport: LocalTransport, store: Store) -> dict:
    late = LateExchange(transport, PrefixStore("late", store), 30.0) if "late" in kind else None
    commit, clip = Again(transport) if "committed" in kind else None, Clip(RADIUS) if "clipped" in kind else None
    return {"commit": commit, "clip": clip, "late": late}


@every_codec
@pytest.mark.parametrize("kind", ["windowed", "clipped", "committed", "committed, clipped", "late", "late, clipped"])
def test_every_averaging_is_the_dense_one_and_keeps_the_mean_of_the_clients(wire, kind):
    """To float32's rounding, however coarse the codec is."""
    x, codec, network, store = values(), CODECS[wire], LocalNetwork(CLIENTS, 30.0), HashStore()
    schedule = build_mixing(GossipConfig(graph="ring"), CLIENTS, seed=0)

    def body(client: int) -> tuple[torch.Tensor, int]:
        transport = network.transport(client)
        transport.checksums = True
        gossip = Gossip(transport, schedule, CHUNK_MIB, codec=codec, **options(kind, transport, store))
        return mix(gossip, 0, x[client]), gossip.bytes_sent

    with ThreadPoolExecutor(CLIENTS) as pool:
        mixed, sent = zip(*pool.map(body, range(CLIENTS)), strict=True)
    y = codec.coded(x).double().numpy()
    radius = RADIUS if "clipped" in kind else None
    expected = average(schedule.matrix(0), y, radius) + x.double().numpy() - y
    rounding = 4 * (2 * CLIENTS + 2) * UNIT * float(x.abs().max())
    got = torch.stack(mixed).double().numpy()
    np.testing.assert_allclose(got, expected, rtol=0, atol=rounding)
    np.testing.assert_allclose(got.mean(axis=0), x.double().numpy().mean(axis=0), rtol=0, atol=rounding)
    assert set(sent) == {(2 if "committed" in kind else 1) * 2 * codec.bytes * NUMEL}


def test_a_value_that_a_codec_cannot_hold_is_refused_by_name():
    """Checked after decoding: float32's largest number is beyond bfloat16's."""
    network, schedule = LocalNetwork(2, 100.0), build_mixing(GossipConfig(), 2, seed=0)
    there, here = (Gossip(network.transport(i), schedule, codec=CODECS["bfloat16"]) for i in range(2))
    large = torch.ones(50)
    large[3] = torch.finfo(torch.float32).max
    begin(there, 0).send(there.chunks([50])[0], "x", large)
    with pytest.raises(GossipError, match="1 of 50 values of client 0 are not finite"):
        mix(here, 0, torch.ones(50))


@every_codec
def test_the_simulation_codes_alike(wire):
    x, network = values(), LocalNetwork(CLIENTS, 30.0)
    mixing = build_mixing(GossipConfig(graph="ring"), CLIENTS, seed=4)
    means = means_of({"theta": x}, mixing, 0, GossipConfig(clip_radius=RADIUS, wire=wire))["theta"]

    def body(client: int) -> torch.Tensor:
        return mix(Gossip(network.transport(client), mixing, codec=CODECS[wire], clip=Clip(RADIUS)), 0, x[client])

    with ThreadPoolExecutor(CLIENTS) as pool:
        mixed = torch.stack(list(pool.map(body, range(CLIENTS))))
    np.testing.assert_allclose(means.numpy(), mixed.numpy(), rtol=0, atol=1e-5)

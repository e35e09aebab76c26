"""Late neighbours: the rule, one decision for both ends of an edge, and gossip over threads that come and go."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import networkx as nx
import numpy as np
import pytest
import torch
from dense_reference import average as dense_average
from gossip_worker import mix, start_values
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import HashStore, PrefixStore

from deca_ds.config.schema import GossipConfig
from deca_ds.errors import ConfigError, ConnectionLostError
from deca_ds.gossip.clip import Clip
from deca_ds.gossip.codec import CODECS
from deca_ds.gossip.gossip import Gossip
from deca_ds.gossip.late import HERE, MET, SKIPPED, TAKEN, EdgeDecision, check_wait, row_without
from deca_ds.gossip.late_exchange import LateExchange
from deca_ds.gossip.schedule import MixingSchedule, build_mixing
from deca_ds.gossip.skip_log import SkipLog
from deca_ds.gossip.weights import weigh
from deca_ds.launch.launcher import ClientLayout
from deca_ds.transport.gloo import GlooTransport, TorchExchange
from deca_ds.transport.local import LocalNetwork, LocalTransport
from deca_ds.transport.transport import Endpoint

NUMEL, CHUNK_MIB = 1000, 0.001  # four chunks


@st.composite
def symmetric_matrices(draw) -> np.ndarray:
    """Doubly stochastic and symmetric: a mixture of graphs' weights and of symmetric permutations."""
    n = draw(st.integers(2, 7))
    edges = draw(st.sets(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)).filter(lambda e: e[0] < e[1])))
    graph = nx.DiGraph()
    graph.add_nodes_from(range(n))
    graph.add_edges_from([edge for i, j in edges for edge in ((i, j), (j, i))])
    rule = draw(st.sampled_from(["metropolis", "max_degree", "lazy_metropolis"]))
    swapped = np.eye(n)
    order = draw(st.permutations(range(n)))
    for i, j in zip(order[::2], order[1::2], strict=False):
        swapped[[i, j]] = swapped[[j, i]]
    share = draw(st.floats(0, 1))
    return share * weigh(graph, rule) + (1 - share) * swapped


@given(symmetric_matrices(), st.data())
def test_any_skipped_edges_leave_a_doubly_stochastic_symmetric_matrix(matrix: np.ndarray, data: st.DataObject):
    n = len(matrix)
    edges = [(i, j) for i in range(n) for j in range(i) if matrix[i, j] > 0]
    skipped = data.draw(st.sets(st.sampled_from(edges))) if edges else set()
    left = np.zeros_like(matrix)
    for i in range(n):
        row = {j: matrix[i, j] for j in range(n) if j == i or matrix[i, j] > 0}
        for j, weight in row_without(row, i, [j for j in row if (i, j) in skipped or (j, i) in skipped]).items():
            left[i, j] = weight
    np.testing.assert_allclose(left.sum(axis=0), 1, atol=1e-12)
    np.testing.assert_allclose(left, left.T, atol=1e-12)
    assert (left >= 0).all()
    for i, j in edges:
        assert left[i, j] == (0 if (i, j) in skipped else matrix[i, j])


@given(st.lists(st.sampled_from([0, 1]), min_size=8, max_size=30), st.sampled_from(["take", "meet"]))
def test_both_ends_read_one_word_whoever_is_first(turns: list[int], kind: str):
    """Two ends that write what they like, in any order of turns: both see the same word, and it is removed."""
    store, rng = HashStore(), random.Random(str(turns))
    ends = [EdgeDecision(store, 5, 0, 1), EdgeDecision(store, 5, 1, 0)]
    for turn in [*turns, *([0, 1] * 4)]:
        word = ends[turn]
        if word.final:
            continue
        if kind == "take":
            word.write(rng.choice([TAKEN, SKIPPED]))
        elif word.blank:
            word.write(HERE)
        elif word.says(HERE) and not word.mine:
            word.write(rng.choice([MET, SKIPPED]))
        else:
            word.write(SKIPPED)
    words = [next(name for name in (TAKEN, SKIPPED, MET) if word.says(name)) for word in ends]
    assert words[0] == words[1]
    assert ends[0].mine != ends[1].mine
    assert store.num_keys() == 0


def test_two_threads_decide_alike_many_times():
    """Each end either has all or has waited long enough, at the same moment as the other end."""
    store, start = HashStore(), threading.Barrier(2)

    def end(client: int) -> list[bool]:
        found = []
        for t in range(300):
            word = EdgeDecision(store, t, client, 1 - client)
            start.wait(100)
            word.write(TAKEN if (t // 2 + client * t) % 2 else SKIPPED)
            found.append(word.says(TAKEN))
        return found

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(end, range(2))
    assert first == second and len(set(first)) == 2


def run_clients(
    schedule: MixingSchedule,
    steps: int,
    pause: Callable[[int, int], None],
    *,
    wait_s: float | Callable[[int], float],
    clip_radius: float | None = None,
    wire: str = "float32",
    store: HashStore | None = None,
) -> tuple[list[torch.Tensor], list[list[list[int]]], list[Gossip]]:
    """Average a shard `steps` times in a thread a client. pause(client, t) comes before each averaging. wait_s: of all
    averagings, or of averaging t.

    Returns the shards, whom each averaging of each client was without, and their ends.
    """
    network, store = LocalNetwork(schedule.size), store or HashStore()

    def body(client: int) -> tuple[torch.Tensor, list[list[int]], Gossip]:
        transport: LocalTransport = network.transport(client)
        late = LateExchange(transport, PrefixStore("late", store), 0.0)
        clip = None if clip_radius is None else Clip(clip_radius)
        gossip = Gossip(transport, schedule, CHUNK_MIB, codec=CODECS[wire], clip=clip, late=late)
        x, skipped = start_values(client, NUMEL), []
        for t in range(steps):
            pause(client, t)
            late.wait_s = wait_s(t) if callable(wait_s) else wait_s
            x = mix(gossip, t, x)
            skipped.append(gossip.skip_log.skipped)
        gossip.drain()
        return x, skipped, gossip

    with ThreadPoolExecutor(schedule.size) as pool:
        done = list(pool.map(body, range(schedule.size)))
    return [x for x, _, _ in done], [skipped for _, skipped, _ in done], [gossip for _, _, gossip in done]


def matrices_of(schedule: MixingSchedule, skipped: list[list[list[int]]]) -> list[np.ndarray]:
    """W of every averaging, from what each client says it was without."""
    found = []
    for t in range(len(skipped[0])):
        matrix = schedule.matrix(t).copy()
        for i, ts in enumerate(skipped):
            for j in ts[t]:
                matrix[i, i] += matrix[i, j]
                matrix[i, j] = 0
        np.testing.assert_allclose(matrix, matrix.T)
        found.append(matrix)
    return found


def assert_dense(schedule, shards, skipped, radius=None) -> None:
    dense = np.stack([start_values(client, NUMEL).double().numpy() for client in range(schedule.size)])
    mean = dense.mean(axis=0)
    for matrix in matrices_of(schedule, skipped):
        dense = dense_average(matrix, dense, radius)
    mixed = torch.stack(shards).double().numpy()
    np.testing.assert_allclose(mixed, dense, atol=1e-5)
    np.testing.assert_allclose(mixed.mean(axis=0), mean, atol=1e-5)


@pytest.mark.parametrize(("radius", "wire"), [(None, "float32"), (5.0, "float32"), (None, "bfloat16")])
def test_a_client_that_stops_for_a_while_is_left_out_and_comes_back(radius: float | None, wire: str, capsys):
    """Client 2 is away until the others have done three averagings without it, which alone do not wait long; they meet
    in the fourth. With any codec the mean stays."""
    schedule = build_mixing(GossipConfig(graph="complete"), 3, seed=0)
    gone_on = threading.Event()

    def pause(client: int, t: int) -> None:
        if client == 0 and t == 6:
            gone_on.set()
        if client == 2 and t == 3:
            assert gone_on.wait(100)

    wait_s, store = lambda t: 3.0 if 3 <= t < 6 else 100.0, HashStore()
    shards, skipped, ends = run_clients(schedule, 20, pause, wait_s=wait_s, clip_radius=radius, wire=wire, store=store)
    assert skipped[0] == [[], [], [], [2], [2], [2], [2], *[[]] * 13]
    assert skipped[2][3] == [0, 1] and skipped[2][7:] == [[]] * 13
    if wire == "float32":
        assert_dense(schedule, shards, skipped, radius)
    start = torch.stack([start_values(client, NUMEL) for client in range(3)])
    torch.testing.assert_close(torch.stack(shards).mean(dim=0), start.mean(dim=0), rtol=0, atol=1e-5)
    assert store.num_keys() == 0
    for gossip in ends:
        # the pool has all its buffers back: those of the messages that were thrown away, too
        assert len(gossip.pool.free) <= 2 * 4 * (2 + 1)
        assert not any(gossip.late._stray.values()) and not any(gossip.late._leaving.values())


@settings(max_examples=6)
@given(st.integers(0, 2**30), st.sampled_from(["ring", "complete", "star"]))
def test_clients_of_any_pace_agree_on_every_matrix(seed: int, kind: str):
    """Waits so short that chance decides, in all orders of events."""
    schedule = build_mixing(GossipConfig(graph=kind), 4, seed=0)
    paces = [random.Random(4 * seed + client) for client in range(4)]
    store = HashStore()
    shards, skipped, _ = run_clients(
        schedule, 25, lambda client, t: time.sleep(paces[client].choice([0, 0, 0.002, 0.02])), wait_s=0.004, store=store
    )
    assert_dense(schedule, shards, skipped)
    assert store.num_keys() == 0


def test_a_neighbour_that_is_away_keeps_one_averaging_of_buffers_alive():
    """Ten averagings without it: the messages of the first one alone wait for it."""
    schedule = build_mixing(GossipConfig(graph="complete"), 2, seed=0)
    back = threading.Event()
    sent = []

    def pause(client: int, t: int) -> None:
        if client == 1 and t == 0:
            assert back.wait(100)
        if client == 0:
            sent.append(t)
            if t == 10:
                back.set()

    _, skipped, ends = run_clients(schedule, 11, pause, wait_s=0.02)
    assert all(without == [1] for without in skipped[0][:10])
    assert ends[0].bytes_sent <= 2 * 4 * NUMEL
    assert len(ends[0].pool.free) <= 2 * 2 * 4


def test_without_anybody_late_the_bits_are_those_of_waiting():
    schedule = build_mixing(GossipConfig(graph="ring"), 4, seed=0)
    shards, skipped, _ = run_clients(schedule, 6, lambda client, t: None, wait_s=100)
    network = LocalNetwork(4)

    def body(client: int) -> torch.Tensor:
        gossip, x = Gossip(network.transport(client), schedule, CHUNK_MIB), start_values(client, NUMEL)
        for t in range(6):
            x = mix(gossip, t, x)
        return x

    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, shards, pool.map(body, range(4))))
    assert not any(any(ts) for ts in skipped)


def test_the_log_tells_when_a_neighbour_begins_to_be_late_and_when_it_is_back(capsys):
    """Two ranks a client, of which the other one alone was without client 2 in the third averaging."""
    ranks = iter([1, 0, 1, 1, 2, 0, 2, 2, 1, 0, 1, 0, 0])
    log = SkipLog(LocalNetwork(3).transport(0), lambda own: next(ranks), reports=True)
    for skipped in ({2: True}, {2: True}, {}):
        log.note([1, 2], skipped)
        assert log.skipped == [2]
    log.note([1, 2], {})
    assert log.skipped == [] and log.times == {2: 3}
    assert capsys.readouterr().err.splitlines() == [
        "client 0, inner step 0: continues without client 2, which is late",
        "client 0, inner step 0: averages with client 2 again, after 3 averagings without it",
    ]


class Failing:
    """A message of gloo whose connection breaks."""

    def wait(self, timeout):
        raise RuntimeError("Connection closed by peer")


def test_a_message_over_torch_that_fails_in_the_background_is_an_error_and_no_wait_of_this_rank():
    transport = GlooTransport(None, Endpoint(ClientLayout(2, 1), 0, timeout_s=1), connected=False)
    transport.progress.wait_for(2)
    exchange = TorchExchange(transport, [("from", 1, Failing())], tag=7)
    told = r"(?s)^rank 1 .client 1. is gone: it was killed.*a message from it .tag 7..*seen:  Connection closed"
    with pytest.raises(ConnectionLostError, match=told):
        while not exchange.test():
            time.sleep(0.001)
    assert transport.progress.awaits == 2


@pytest.mark.parametrize("kind", ["one_peer_exponential", "exponential"])
def test_a_matrix_that_is_not_symmetric_is_refused(kind: str):
    schedule = build_mixing(GossipConfig(graph=kind), 5, seed=0)
    check_wait(None, schedule)
    with pytest.raises(ConfigError, match=f"not symmetric .{kind}") as caught:
        check_wait(2.0, schedule)
    assert caught.value.where == "gossip.wait_s" and "gossip.graph" in caught.value.fix


@pytest.mark.parametrize("kind", ["ring", "torus", "star", "erdos_renyi", "bipartite", "isolated"])
def test_undirected_graphs_may_have_late_neighbours(kind: str):
    check_wait(2.0, build_mixing(GossipConfig(graph=kind), 6, seed=0))

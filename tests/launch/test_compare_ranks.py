"""Ranks that differ are named against the majority, before anything is loaded."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from deca_ds.config import load_config
from deca_ds.errors import LaunchError
from deca_ds.launch import compare_ranks
from deca_ds.launch.compare_ranks import compare_software, compare_start, odd_ones
from deca_ds.launch.launcher import Launch
from deca_ds.launch.store import JobStore

RANKS = 4


def on_all_ranks(body) -> list[str]:
    """body(launch, store) of every rank in a thread; the errors' messages."""
    shared = HashStore()

    def rank(number: int) -> str:
        here.rank = number
        try:
            body(Launch("python", number, RANKS, 0, None), JobStore(shared, None, timedelta(seconds=100)))
        except LaunchError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(RANKS) as pool:
        return list(pool.map(rank, range(RANKS)))


here = threading.local()


def software(*overrides, matrices=(b"w",), odd: tuple[str, ...] = ()):
    def body(launch: Launch, store: JobStore) -> None:
        config = load_config(None, ["model.path=x", *overrides, *(odd if launch.rank == 2 else ())])
        compare_software(config, launch, store, matrices)

    return body


def test_equal_ranks_pass_whatever_is_a_matter_of_their_hosts():
    odd = ("run.output=/scratch/other", "run.threads=1", "data.train=[/there/rows.jsonl]", "model.path=/there")
    assert on_all_ranks(software(odd=odd)) == [""] * RANKS


def test_another_value_of_a_key_is_named_with_rank_and_majority():
    for message in on_all_ranks(software(odd=("optimizer.lr=0.1", "gossip.graph=star"))):
        assert "rank 2 on" in message and 'has gossip.graph = "star", 3 others "base"' in message


def test_another_version_is_refused_or_warned_of(monkeypatch, capsys):
    installed = compare_ranks.version_of
    other = lambda name: "5.22.0" if name == "transformers" and here.rank == 1 else installed(name)  # noqa: E731
    monkeypatch.setattr(compare_ranks, "version_of", other)
    for message in on_all_ranks(software()):
        assert "rank 1 on" in message and f"has transformers 5.22.0, 3 others {installed('transformers')}" in message
        assert "cluster.allow_mixed_versions" in message
    assert on_all_ranks(software("cluster.allow_mixed_versions=true")) == [""] * RANKS
    assert capsys.readouterr().err.count("WARNING: rank 1") == 1


def test_other_source_files_are_refused_always(monkeypatch):
    monkeypatch.setattr(compare_ranks, "code_digest", lambda root: "old" if here.rank in (1, 3) else "new")
    for message in on_all_ranks(software("cluster.allow_mixed_versions=true")):
        assert (
            "ranks 1 on" in message and "3 on" in message and "have deca_ds source files old, 2 others new" in message
        )


def test_other_initial_parameters_are_named_among_ranks_of_equal_shard():
    def body(launch: Launch, store: JobStore) -> None:
        held = "damaged" if launch.rank == 3 else f"shard {launch.rank % 2}"
        compare_start(launch, store, {"initial parameters": held}, ranks_per_client=2)

    for message in on_all_ranks(body):
        assert "rank 3 on" in message and "has initial parameters damaged, 1 other shard 1" in message


def test_digests_of_whole_clients_are_compared_among_all_ranks():
    def body(launch: Launch, store: JobStore) -> None:
        compare_start(launch, store, {"initial parameters": "odd" if launch.rank in odd else "same"}, 1)

    odd: tuple[int, ...] = ()
    assert on_all_ranks(body) == [""] * RANKS
    odd = (3,)
    assert all("rank 3 on" in message and "3 others same" in message for message in on_all_ranks(body))


def test_ranks_that_differ_from_the_majority_are_named():
    assert odd_ones(dict(enumerate(["a", "a"])), dict(enumerate(["h", "h"]))) == []
    assert odd_ones(dict(enumerate(["b", "a", "a"])), dict(enumerate(["n0", "n1", "n2"]))) == [
        "rank 0 on n0 has {} b, 2 others a"
    ]
    assert odd_ones(dict(enumerate(["b", "a"])), dict(enumerate(["n0", "n1"]))) == ["rank 1 on n1 has {} a, 1 other b"]


def test_a_rank_that_does_not_come_is_named():
    store = HashStore()
    store.set_timeout(timedelta(seconds=0.3))
    job = JobStore(store, None, timedelta(seconds=0.3))
    store.set("key/1/2", "1")
    with pytest.raises(LaunchError, match=r"rank 0 on .* waited 0\.3 s for ranks 1, 3"):
        job.gather(Launch("python", 0, 4, 0, None), "key", 1)

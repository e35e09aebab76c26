"""Whose progress a wait's deadline counts from, and what a stalled rank says, with ranks that are plain objects."""

from __future__ import annotations

import json
import time

import pytest
from torch.distributed import HashStore

from deca_ds.cluster import heartbeat
from deca_ds.cluster.heartbeat import Heartbeats, read_heartbeats
from deca_ds.cluster.launch import ClientLayout, Launch
from deca_ds.cluster.progress import EVERYBODY, Progress
from deca_ds.errors import StallError

TIMEOUT_S = 100.0


class Job:
    """Six ranks, three clients of two or of other sizes; time passes when `later` is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...] = (2, 2, 2)):
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "time", lambda: self.now)
        self.store = HashStore()
        layout = ClientLayout.of(sizes)
        self.ranks = [Heartbeats(Launch("deepspeed", rank, 6, rank, None)) for rank in range(6)]
        for rank in self.ranks:
            rank.progress.watch(layout, TIMEOUT_S)
            rank.progress.enter("gradient", step=412)
        self.silent: set[int] = set()

    def later(self, seconds: int, *working: int) -> None:
        """So many seconds go by, in which the ranks `working` move on and all but the silent ones beat."""
        for _ in range(seconds):
            self.now += 1
            for number, rank in enumerate(self.ranks):
                if number in working:
                    rank.progress.tick()
                if number not in self.silent:
                    rank.beat(self.store)
                    error = rank.stalled(self.store)
                    if error is not None:
                        raise error


@pytest.fixture
def job(monkeypatch) -> Job:
    return Job(monkeypatch)


def test_a_rank_that_is_alone_or_at_work_may_take_its_time(job):
    job.later(3 * int(TIMEOUT_S), *range(6))
    assert job.ranks[0].stalled(job.store) is None


def test_a_wait_for_a_client_lasts_while_that_client_works_and_ends_when_it_does_not(job):
    for rank in (0, 1):
        job.ranks[rank].progress.enter("the end")
        job.ranks[rank].progress.wait_for(2)
    job.later(5 * int(TIMEOUT_S), 2, 3, 4, 5)
    with pytest.raises(Exception, match="no progress for") as caught:
        job.later(2 * int(TIMEOUT_S), 2, 3)
    text = str(caught.value)
    # whoever says so first: all name the ranks of client 2 and where they were
    assert "client 2): gradient, step 412" in text and "cluster.timeout_s" in text
    assert caught.value.where == "the end, step 412" or caught.value.where == "gradient, step 412"


def test_patience_follows_the_chain_of_waits_but_no_circle(job):
    for rank, awaited in ((0, 1), (1, 1), (2, 2), (3, 2)):  # client 0 waits for client 1, which waits for client 2
        job.ranks[rank].progress.wait_for(awaited)
    job.later(4 * int(TIMEOUT_S), 4, 5)
    for rank in (4, 5):  # and now client 2 for client 0
        job.ranks[rank].progress.wait_for(0)
    with pytest.raises(Exception, match="this rank waits for"):
        job.later(2 * int(TIMEOUT_S))


def test_the_rank_that_keeps_silent_is_named_within_a_client(job):
    job.later(2, *range(6))
    job.silent.add(3)
    with pytest.raises(Exception, match="waits for rank 3 on") as caught:
        job.later(2 * int(TIMEOUT_S), 0, 1, 4, 5)
    assert "no sign of life for" in str(caught.value)
    assert "rank 3 on" in job.ranks[2].last_seen(job.store)


def test_who_keeps_silent_passes_no_patience_on(job):
    job.ranks[3].progress.wait_for(2)
    job.later(2, *range(6))
    job.silent.add(3)  # its last words: it waits for client 2, which works on
    with pytest.raises(Exception, match="waits for rank 3 on"):
        job.later(2 * int(TIMEOUT_S), 0, 1, 4, 5)


def test_a_wait_for_everybody_and_a_rank_never_seen(job):
    job.silent.add(5)
    job.ranks[0].progress.wait_for(EVERYBODY)
    for rank in job.ranks[1:]:
        rank.progress.timeout_s = None  # not they
    with pytest.raises(Exception, match="rank 5: never"):
        job.later(2 * int(TIMEOUT_S))


def test_a_rank_finds_itself_hanging_when_others_wait_for_it_and_is_sure_of_it(monkeypatch):
    job = Job(monkeypatch, sizes=(1, 1, 1, 1, 1, 1))
    own = lambda: job.ranks[2].stalled(job.store, own=True)  # noqa: E731
    for rank in job.ranks:
        rank.progress.timeout_s = None  # others say nothing
    job.ranks[2].progress.timeout_s = TIMEOUT_S
    job.later(2 * int(TIMEOUT_S))
    assert [own() for _ in range(9)] == [None] * 9, "nobody waits for it"
    job.ranks[4].progress.wait_for(2)
    job.later(1)
    assert own() is None and own() is None
    job.ranks[2].progress.tick()  # it was only stopped
    assert own() is None
    job.later(int(TIMEOUT_S))
    assert [own(), own()] == [None, None]
    stall = own()
    assert stall is not None and stall.clients == {2} and stall.idle_s >= TIMEOUT_S
    assert "rank 4 on" in str(stall) and "waits for it" in str(stall) and job.ranks[2].stalled(job.store) is None


def test_a_stall_names_whose_ranks_are_waited_for(job):
    for rank in job.ranks:
        rank.progress.timeout_s = None
    job.ranks[2].progress.timeout_s = TIMEOUT_S
    for awaited, clients in ((0, {0, 1}), (EVERYBODY, {0, 1, 2}), (None, {1})):  # of its own client there is rank 3
        job.ranks[2].progress.enter("gossip")
        job.ranks[2].progress.wait_for(awaited)
        with pytest.raises(StallError) as caught:
            job.later(2 * int(TIMEOUT_S))
        assert caught.value.clients == clients and caught.value.idle_s >= TIMEOUT_S


def test_the_deadline_is_not_used_before_the_ranks_are_known():
    progress = Progress()
    assert progress.deadline_s(7.0) == 7.0
    progress.watch(ClientLayout(1, 1), 7.0)
    assert progress.deadline_s(7.0) > 1e6


def test_heartbeats_are_files_too(job, tmp_path):
    job.ranks[1].folder = tmp_path / heartbeat.FOLDER
    job.later(1)
    job.ranks[1].progress.enter("gossip", block="layers 0-1")
    job.ranks[1].progress.wait_for(2)
    assert not job.ranks[1].beat(job.store), "not yet time"
    job.ranks[1].beat(job.store, last=True)
    (read,) = read_heartbeats(tmp_path)
    assert (read.rank, read.client, read.step, read.block, read.awaits) == (1, 0, 412, "layers 0-1", 2)
    assert "rank 1 on" in str(read) and "gossip, waiting for client 2, step 412, block layers 0-1, 0 s ago" in str(read)
    text = (tmp_path / heartbeat.FOLDER / "rank_0001.json").read_text()
    assert json.loads(text)["phase"] == "gossip" and len(list((tmp_path / heartbeat.FOLDER).iterdir())) == 1


def test_among_clients_of_different_sizes_a_rank_waits_for_any_rank_of_the_other(monkeypatch):
    job = Job(monkeypatch, sizes=(1, 3, 2))
    job.ranks[0].progress.wait_for(1)  # client 1 has ranks 1 to 3
    job.later(150, 2, 4, 5)
    job.silent = {1, 2, 3}
    with pytest.raises(StallError, match=r"this rank waits for rank 1 on .*, rank 2 on .*, rank 3 on"):
        job.later(150, 4, 5)

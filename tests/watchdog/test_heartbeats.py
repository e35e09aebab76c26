"""Whose progress a wait's deadline counts from, and what a stalled rank says, with ranks that are plain objects."""

from __future__ import annotations

import json
import random
import time

import pytest
from torch.distributed import HashStore

from deca_ds.errors import CheckpointError, StallError
from deca_ds.launch.launcher import ClientLayout, Launch
from deca_ds.launch.progress import EVERYBODY, SHARED, Progress
from deca_ds.watchdog.heartbeats import Heartbeats, Sightings, read_heartbeats
from deca_ds.watchdog.survey import Survey

TIMEOUT_S = 100.0


class Taken:
    """Signs of work, as the test gives them."""

    works = False

    def seen(self) -> bool:
        return self.works


class Job:
    """Six ranks, three clients of two or of other sizes; time passes when `later` is called.

    host: the rank that tells the others how patient to be; None: each has to see for itself.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...] = (2, 2, 2), host: int | None = None):
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "time", lambda: self.now)
        self.store = HashStore()
        layout = ClientLayout.of(sizes)
        self.there = list(range(6))
        self.ranks = [self.rank(number) for number in range(6)]
        self.host, self.surveys = host, [Survey(rank) for rank in self.ranks]
        for rank in self.ranks:
            rank.progress.watch(layout, TIMEOUT_S)
            rank.progress.enter("gradient", step=412)
        self.silent: set[int] = set()

    def rank(self, number: int) -> Heartbeats:
        return Heartbeats(Launch("deepspeed", number, 6, number, None), lambda: self.there, signs=Taken())

    def later(self, seconds: int, *working: int) -> None:
        """So many seconds go by, in which the ranks `working` move on and all but the silent ones beat."""
        for _ in range(seconds):
            self.now += 1
            for number, rank in enumerate(self.ranks):
                if number in working:
                    rank.progress.tick()
                if number not in self.silent:
                    rank.beat(self.store)
                    if number == self.host:
                        self.surveys[number].publish(self.store)
                    error = rank.stalled(self.store)
                    if error is not None:
                        raise error


@pytest.fixture(params=[None, 0], ids=["alone", "told"])
def job(monkeypatch, request) -> Job:
    return Job(monkeypatch, host=request.param)


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


def test_the_rank_that_is_awaited_is_named_with_its_host(job):
    """In a collective the others of its client, in a gossip also those that it exchanges with; not whom these await."""
    job.later(2, *range(6))
    host = job.ranks[0].launch.host
    ((who, when),) = job.ranks[2].other_end(job.store)
    assert who == f"rank 3 on {host} (client 1)" and when.endswith(" s ago")
    job.ranks[3].progress.wait_for(2)
    job.ranks[2].progress.wait_for(0)
    assert [who for who, _ in job.ranks[2].other_end(job.store)] == [
        f"rank {rank} on {host} (client {rank // 2})" for rank in (0, 3)
    ]
    assert job.ranks[2].other_end(job.store, 4)[0][0] == f"rank 4 on {host} (client 2)", "whom an error names"
    assert job.ranks[2].other_end(HashStore()) == [("rank 0", ""), ("rank 3", "")], "a store that knows of nobody"


def test_a_silent_rank_passes_no_patience_on(job):
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
    job.ranks[1].write_to(tmp_path / "heartbeats")
    job.later(1)
    job.ranks[1].progress.enter("gossip", block="layers 0-1")
    job.ranks[1].progress.wait_for(2)
    assert not job.ranks[1].beat(job.store), "not yet time"
    job.ranks[1].beat(job.store, last=True)
    (read,) = read_heartbeats(tmp_path)
    assert (read.rank, read.client, read.step, read.block, read.awaits) == (1, 0, 412, "layers 0-1", 2)
    assert "rank 1 on" in str(read) and "gossip, waiting for client 2, step 412, block layers 0-1, 0 s ago" in str(read)
    text = (tmp_path / "heartbeats" / "rank_0001.json").read_text()
    assert json.loads(text)["phase"] == "gossip" and len(list((tmp_path / "heartbeats").iterdir())) == 1


def test_the_file_tells_at_once_of_a_run_that_begins_and_that_others_would_go_on(job, tmp_path):
    """A fast job makes its first steps before the watcher's next heartbeat is due."""
    job.ranks[1].beat(job.store)
    job.ranks[1].write_to(tmp_path / "heartbeats")
    assert [(beat.rank, beat.outlived) for beat in read_heartbeats(tmp_path)] == [(1, False)]
    job.ranks[1].let_others_go_on()
    assert [beat.outlived for beat in read_heartbeats(tmp_path)] == [True]


def test_among_clients_of_different_sizes_a_rank_waits_for_any_rank_of_the_other(monkeypatch):
    job = Job(monkeypatch, sizes=(1, 3, 2))
    job.ranks[0].progress.wait_for(1)  # client 1 has ranks 1 to 3
    job.later(150, 2, 4, 5)
    job.silent = {1, 2, 3}
    with pytest.raises(StallError, match=r"this rank waits for rank 1 on .*, rank 2 on .*, rank 3 on"):
        job.later(150, 4, 5)


def test_work_that_shows_is_waited_for_and_work_that_hangs_ends_the_job_by_name(job):
    """The host loads; its client's other rank and all others are at a barrier."""
    job.ranks[0].progress.enter("loading the model", works=True, awaits=SHARED)
    for rank in job.ranks[1:]:
        rank.progress.enter("comparing the models")
        rank.progress.wait_for(EVERYBODY)
    job.ranks[0].signs.works = True
    job.later(5 * int(TIMEOUT_S))
    job.ranks[0].signs.works = False
    job.later(int(TIMEOUT_S) - 1)
    with pytest.raises(StallError) as caught:
        job.later(5)
    assert caught.value.where.startswith("comparing the models") and "waits for rank 0 on" in str(caught.value)
    assert "rank 0 on" in str(caught.value) and "loading the model, step 412, 100 s ago" in str(caught.value)
    stalls = [job.ranks[0].stalled(job.store) for _ in range(3)]
    assert stalls[:1] == [None], "it is sure of it only after several looks"
    assert "no sign of work: this rank takes no CPU time" in str(stalls[-1])
    assert stalls[-1].where.startswith("loading the model")


def test_a_rank_that_hangs_at_work_that_nobody_waits_for_ends_too(job):
    job.ranks[2].progress.enter("saving", works=True)
    job.ranks[3].progress.enter("the end")
    job.ranks[3].progress.timeout_s = None
    job.later(int(TIMEOUT_S) - 1, 0, 1, 4, 5)
    with pytest.raises(StallError, match=r"no sign of work[\s\S]*rank 3 on .*: the end") as caught:
        job.later(5, 0, 1, 4, 5)
    assert caught.value.clients == {1} and caught.value.idle_s >= TIMEOUT_S


@pytest.mark.parametrize("host", [None, 0])
def test_ranks_that_share_a_cache_wait_for_whoever_works_on_it(monkeypatch, host):
    job = Job(monkeypatch, sizes=(1, 1, 1, 1, 1, 1), host=host)
    for rank in job.ranks[3:]:
        rank.progress.enter("reading the data", works=True, awaits=SHARED)
    job.ranks[4].progress.timeout_s = job.ranks[5].progress.timeout_s = None
    job.ranks[4].signs.works = True
    job.later(3 * int(TIMEOUT_S), 0, 1, 2)  # rank 3 waits for the lock that rank 4, another client, holds
    job.ranks[4].signs.works = False
    with pytest.raises(StallError, match=r"no sign of work[\s\S]*rank 5 on") as caught:
        job.later(int(TIMEOUT_S) + 10, 0, 1, 2)  # those that train do not hold it
    assert "rank 0 on" not in str(caught.value)


def test_signs_of_work_say_nothing_in_a_wait(job):
    progress = job.ranks[0].progress
    progress.enter("evaluation", works=True)
    job.ranks[0].signs.works = True
    with progress.waiting(EVERYBODY):
        assert not progress.at_work
        with pytest.raises(StallError, match="this rank waits for"):
            job.later(2 * int(TIMEOUT_S))
    assert progress.at_work
    progress.enter("the end")
    assert not progress.at_work


def test_what_the_host_told_of_an_earlier_standstill_counts_no_more(monkeypatch):
    job = Job(monkeypatch, host=0)
    for rank in job.ranks[1:]:
        rank.progress.wait_for(EVERYBODY)
    job.later(90)
    for rank in job.ranks:
        rank.progress.tick()
    job.later(2)
    assert job.store.check(["standstill/3"])
    job.host = None  # rank 3 finds the old word when it stands still again, and then reads for itself
    job.later(95)
    with pytest.raises(StallError):
        job.later(20)


def test_another_host_continues_telling_from_a_store_of_its_own(monkeypatch):
    job = Job(monkeypatch, host=0)
    for rank in job.ranks[2:]:
        rank.progress.wait_for(EVERYBODY)
    job.later(30)
    job.silent, job.store, job.host = {0, 1}, HashStore(), 2
    job.there = [2, 3, 4, 5]
    asked = []
    monkeypatch.setattr(Heartbeats, "_awaited", lambda *_: asked.append(1) or [])
    job.later(60)
    assert not asked and job.store.check(["standstill/3"]) and not job.store.check(["standstill/0"])
    monkeypatch.undo()


@pytest.mark.parametrize("seed", range(20))
def test_the_host_knows_what_each_would_see_for_itself(monkeypatch, seed):
    """Random waits, chains and circles among them, silent ranks, ranks that have gone."""
    draw = random.Random(seed)
    job = Job(monkeypatch, sizes=draw.choice([(2, 2, 2), (1, 3, 2), (1, 1, 1, 1, 1, 1)]), host=0)
    clients = job.ranks[0].progress.layout.clients
    job.there = list(range(5 if seed % 3 == 0 else 6))
    for rank in job.ranks:
        rank.progress.enter("anything")
        rank.progress.wait_for(draw.choice([None, EVERYBODY, SHARED, *range(clients)]))
    job.later(2)
    job.silent = {draw.randrange(1, 5)} if seed % 2 else set()
    for number in draw.sample(range(5), 3):
        job.later(draw.randrange(8, 20), number)
    own = Survey(job.ranks[0])
    own._seen = job.surveys[0]._seen
    job.store = HashStore()
    for rank in job.ranks:
        rank._due = 0.0
        rank.beat(job.store)
    seen = own._seen
    own.publish(job.store)
    for number, rank in enumerate(job.ranks):
        if number in job.silent or number not in job.there or job.now - seen[number].moved < 5:
            continue
        view = Sightings(seen)
        awaited = rank._awaited(view, job.store, job.now)
        moved = max(view[other].moved for other in [number, *awaited] if other in view)
        assert json.loads(job.store.get(f"standstill/{number}"))[0] == pytest.approx(job.now - moved, abs=0.01)


class Counted:
    """A rank's connection to a store, and how many keys it has asked for or set."""

    def __init__(self, store: HashStore):
        self.store, self.keys = store, 0

    def _ask(self, what: str, keys: list[str], *rest: str):
        self.keys += len(keys)
        return getattr(self.store, what)(keys if what in ("check", "multi_get") else keys[0], *rest)

    def check(self, keys: list[str]) -> bool:
        return self._ask("check", keys)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return self._ask("multi_get", keys)

    def get(self, key: str) -> bytes:
        return self._ask("get", [key])

    def set(self, key: str, value: str) -> None:
        self._ask("set", [key], value)


@pytest.mark.parametrize("waits", ["everybody", "ring"])
def test_reads_of_the_store_grow_with_the_ranks_and_not_with_their_square(monkeypatch, waits):
    """One rank works, all others wait for it: at a barrier, or each for its neighbour."""
    seconds, asked = 60, {}
    for total in (16, 128):
        now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: now)  # noqa: B023
        monkeypatch.setattr(time, "time", lambda: now)  # noqa: B023
        store = HashStore()
        stores = [Counted(store) for _ in range(total)]
        there = range(total)
        ranks = [Heartbeats(Launch("deepspeed", r, total, r, None), lambda: there, signs=Taken()) for r in there]  # noqa: B023
        survey = Survey(ranks[0])
        for number, rank in enumerate(ranks):
            rank.progress.watch(ClientLayout(total, 1), TIMEOUT_S)
            rank.progress.enter("gossip")
            rank.progress.wait_for(EVERYBODY if waits == "everybody" else (number + 1) % total)
        for _ in range(seconds):
            now += 1
            ranks[-1].progress.tick()
            for number, rank in enumerate(ranks):
                rank.beat(stores[number])
                if number == 0:
                    survey.publish(stores[0])
                assert rank.stalled(stores[number]) is None
        asked[total] = stores[0].keys, max(one.keys for one in stores[1:])
    assert asked[16][1] == asked[128][1] <= 3 * seconds  # its heartbeat, and what it is told
    assert asked[128][0] <= 9 * asked[16][0] and asked[128][0] <= 4 * 128 * seconds


OTHERS = ['{"rank": 0, "mood": "fine"}', "[1]", "null", "3", "", '{"rank": 0', "\x00\x00"]


@pytest.mark.parametrize("text", OTHERS)
def test_a_heartbeat_of_another_version_is_told_and_stands_in_no_errors_way(job, tmp_path, text):
    job.ranks[2].write_to(tmp_path / "heartbeats")
    file = tmp_path / "heartbeats" / "rank_0003.json"
    file.write_text(text)
    with pytest.raises(CheckpointError, match="no heartbeat of this version of deca_ds") as told:
        read_heartbeats(tmp_path)
    assert told.value.where == str(file)
    assert job.ranks[2].other_end(None) == [("rank 3", "")]


def test_a_heartbeat_that_cannot_be_read_is_told_and_stands_in_no_errors_way(job, tmp_path):
    job.ranks[2].write_to(tmp_path / "heartbeats")
    (tmp_path / "heartbeats" / "rank_0003.json").mkdir()
    with pytest.raises(CheckpointError, match="cannot read a heartbeat: Is a directory"):
        read_heartbeats(tmp_path)
    assert job.ranks[2].other_end(None) == [("rank 3", "")]

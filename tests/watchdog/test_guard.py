"""How one rank's failure ends another rank, with processes that know nothing but the job's store."""

import errno
import json
import os
import re
import subprocess
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from jobs import free_port, preloaded_server, wait_until
from preloaded import ADDRESS, PYTHON
from torch.distributed import HashStore

from deca_ds.errors import ConfigError, CutOffError, DataError, public_message, whole_message
from deca_ds.launch.launcher import ClientLayout, Launch
from deca_ds.launch.store import JobStore
from deca_ds.launch.view import Membership, View
from deca_ds.transport.local import LocalNetwork
from deca_ds.watchdog import ending
from deca_ds.watchdog.failure import Failure, all_leave, is_lost_connection, lost_connection, note_leaving
from deca_ds.watchdog.guard import JobGuard
from deca_ds.watchdog.heartbeats import Heartbeat, Heartbeats
from deca_ds.watchdog.standing import Elasticity, Rejoining
from deca_ds.watchdog.stop import StopByCommit

WORKER = str(Path(__file__).with_name("guard_worker.py"))
STAY = ("stays", "stopped")


def run(tmp_path, *what: str) -> tuple[list[int], list[str]]:
    """Exit codes and outputs. What stays until the others have ended (see the worker) is told so."""
    port, environment = str(free_port()), {**os.environ, ADDRESS: preloaded_server().address}
    processes = [
        subprocess.Popen(
            [*PYTHON, WORKER, str(rank), port, what[rank], str(tmp_path)], env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(3)
    ]  # fmt: skip
    outputs = {}
    try:
        for rank in sorted(range(3), key=lambda rank: what[rank] in STAY):
            if what[rank] in STAY:
                (tmp_path / "over").touch()
            outputs[rank] = processes[rank].communicate(timeout=200)[0]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], [outputs[rank] for rank in range(3)]


@pytest.mark.multiprocess
def test_the_first_failure_ends_all_and_is_told_once(tmp_path):
    codes, outputs = run(tmp_path, "wait", "wait", "user")
    assert codes == [2, 2, 2]
    text = "".join(outputs)
    assert text.count("rank 2") == 1 and text.count("the value is odd") == 1 and "make it even" in text
    assert "Traceback" not in text
    assert "the value is odd" in (tmp_path / "FAILED").read_text()


@pytest.mark.multiprocess
def test_a_defect_keeps_its_traceback_and_the_first_one_wins(tmp_path):
    codes, outputs = run(tmp_path, "wait", "user", "second bug")
    assert codes == [2, 2, 2]
    assert "the value is odd" in "".join(outputs) and "a defect" not in (tmp_path / "FAILED").read_text()
    codes, outputs = run(tmp_path / "none", "wait", "bug", "wait")
    assert codes == [1, 1, 1]
    assert "RuntimeError: a defect" in outputs[1] and "Traceback" in outputs[1]


@pytest.mark.multiprocess
def test_a_rank_s_own_watcher_does_not_cut_its_message_short(tmp_path):
    codes, outputs = run(tmp_path, "wait", "slow", "wait")
    assert codes == [1, 1, 1]
    assert "told in full" in outputs[1]


@pytest.mark.multiprocess
def test_what_may_quote_data_stays_with_its_rank(tmp_path):
    codes, outputs = run(tmp_path, "wait", "wait", "data")
    assert codes == [2, 2, 2]
    assert "secret" in outputs[2] and "secret" not in outputs[0] + outputs[1]
    shared = public_message(DataError("row 3 says 'secret'")) + public_message(KeyError("secret"))
    assert "secret" not in shared and "DataError" in shared and "KeyError" in shared


GLOO = "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234"
GONE = "rank 1 on n1 (client 0) is gone, last seen in gradient, step 3, block layer 1, "


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError(GLOO), GONE),
        (LocalNetwork(2).transport(0).lost(1, "from", 5, GLOO), GONE),
        (RuntimeError("a defect"), "Traceback"),
        (ConfigError("Broken pipe"), "Broken pipe"),
    ],
)
def test_a_connection_that_broke_is_told_as_what_it_means(error, words, monkeypatch):
    """To all ranks, by who is at the other end, where and when, what to look at, and the library's words last; not by
    the traceback of whom it hit."""
    store, left = HashStore(), []
    made = JobGuard(Launch("deepspeed", 0, 2, 0, None), JobStore(store, None, timedelta(seconds=100)))
    made.progress.watch(ClientLayout(1, 2), 60.0)
    beat = Heartbeat(1, "n1", 0, "gradient", 3, "layer 1", None, 0.1, time.time())
    store.set("heartbeat/1", json.dumps(asdict(beat)))
    monkeypatch.setattr(made._ending, "leave", left.append)
    try:
        raise error
    except Exception as caught:
        made.fail(caught)
    (told,) = left
    assert words in told.message and told.code == (2 if isinstance(error, ConfigError) else 1)
    if words == GONE:
        assert told.message.startswith(GONE) and told.message.endswith(GLOO)
        assert "s ago: it was killed, or its host is out of reach\n  fix:   look at" in told.message
        assert "Traceback" not in told.message and "dmesg" in told.message
        assert Failure.reported(store).message == told.message
    made._watcher.close()


def test_one_of_several_ranks_may_be_at_the_other_end():
    assert is_lost_connection(RuntimeError("Read error: Connection reset by peer"))
    said = lost_connection(RuntimeError(GLOO), [("rank 1 on n0", "gossip, step 3, 1 s ago"), ("rank 3", "")])
    assert said.splitlines()[:3] == [
        "one of these ranks is gone: it was killed, or its host is out of reach",
        "    rank 1 on n0: gossip, step 3, 1 s ago",
        "    rank 3",
    ]


class GoneStore(HashStore):
    """One whose host has been killed."""

    def check(self, keys):
        raise RuntimeError("Connection reset by peer")


def test_where_the_store_is_gone_a_file_tells_at_what_its_host_was(tmp_path):
    made = Heartbeats(Launch("deepspeed", 1, 2, 1, None), lambda: [0, 1])
    assert made.other_end(GoneStore(), 0) == [("rank 0", "")]
    folder = tmp_path / "heartbeats"
    folder.mkdir()
    beat = Heartbeat(0, "n0", 0, "gossip", 3, "layer 1", 1, 0.0, time.time())
    (folder / "rank_0000.json").write_text(json.dumps(asdict(beat)))
    made.write_to(folder)
    ((who, when),) = made.other_end(GoneStore(), 0)
    assert who == "rank 0 on n0 (client 0)" and when.startswith("gossip, waiting for client 1, step 3, block layer 1, ")


def test_an_interrupt_is_one_line_without_a_traceback():
    for message in (public_message(KeyboardInterrupt()), whole_message(KeyboardInterrupt())):
        assert message.startswith("interrupted (SIGINT)") and "\n" not in message


@pytest.mark.multiprocess
def test_a_rank_0_that_vanishes_ends_the_others(tmp_path):
    codes, outputs = run(tmp_path, "vanish", "ready", "ready")
    assert codes == [7, 1, 1]
    assert re.search(r"rank 0\b.* is gone.*: it ended without a report\n  fix:   look at", outputs[1] + outputs[2])


@pytest.mark.multiprocess
def test_a_rank_that_is_out_of_the_job_ends_though_it_hangs(tmp_path):
    codes, outputs = run(tmp_path, "stays", "out", "stays")
    assert codes[1] == -9 and "client 1 ends" in outputs[1] and "its main thread hangs" in outputs[1]
    assert "its main thread hangs" in (tmp_path / "FAILED_client_001").read_text()


@pytest.mark.multiprocess
def test_a_rank_that_waits_to_be_let_in_gives_up_alone(tmp_path):
    codes, outputs = run(tmp_path, "stays", "rejoins", "stays")
    assert (codes[0], codes[1]) == (0, 1) and "no progress for" in outputs[1]
    assert "no progress" not in outputs[0] + outputs[2] and "rank 1" not in outputs[0] + outputs[2]


@pytest.mark.multiprocess
def test_a_rank_0_that_is_stopped_as_a_process_ends_the_others(tmp_path):
    """It takes the store along, which answers nothing, and takes every connection."""
    codes, outputs = run(tmp_path, "stopped", "idle", "idle")
    assert codes == [7, 1, 1]
    for output in outputs[1:]:
        assert "no answer for" in output and "look at rank 0: its process is stopped" in output
    assert "from the job's store, which rank 0 hosts" in (tmp_path / "FAILED").read_text()


@pytest.mark.multiprocess
def test_a_stop_before_training_ends_all_with_zero_wherever_they_are(tmp_path):
    codes, outputs = run(tmp_path, "loads", "asked", "hangs")
    assert (codes, outputs) == ([0, 0, 0], ["", "", ""])
    assert len(list(tmp_path.glob("stopped*"))) == 3


class Ended(BaseException):
    """In place of the end of this process."""


def fails(made: JobGuard, error: Exception, monkeypatch) -> int:
    """The exit code."""

    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(ending, "end_process", end)
    try:
        with pytest.raises(Ended) as ended:
            made.fail(error)
    finally:
        made._watcher.close()
    return ended.value.args[0]


@pytest.mark.parametrize("role", ["rejoins", "is let in", "member"])
@pytest.mark.parametrize("error", [CutOffError("it was lost"), RuntimeError("failed to recv, got 0 bytes")])
def test_who_was_not_let_in_before_the_job_finished_ends_in_order(role, error, monkeypatch, capsys):
    launch, store = Launch("deepspeed", 1, 2, 1, None), JobStore(HashStore(), None, timedelta(seconds=100))
    made = JobGuard(launch, store, None if role == "member" else Rejoining(0, told_over=lambda: "it has finished"))
    if role == "is let in":
        made.enter_elastic(Elasticity(Membership(View.of_all(2)), ClientLayout(2, 1), StopByCommit()))
        made._standing.let_others_go_on()
        monkeypatch.setattr(made._ending, "end_the_client", lambda error: made._ending.end_alone(error, mark=False))
    code = fails(made, error, monkeypatch)
    told = capsys.readouterr()
    assert (code, told.out) == ((0, "it has finished\n") if role == "rejoins" else (1, ""))
    assert (str(error) in told.err) == (role != "rejoins")


def test_a_mistake_of_a_rejoining_client_is_told_though_the_job_has_finished(monkeypatch, capsys):
    launch, store = Launch("deepspeed", 1, 2, 1, None), JobStore(HashStore(), None, timedelta(seconds=100))
    made = JobGuard(launch, store, Rejoining(0, told_over=lambda: "it has finished"))
    assert fails(made, ConfigError("the value is odd"), monkeypatch) == 2
    assert "the value is odd" in capsys.readouterr().err


def test_the_host_of_the_store_stays_until_the_others_know_why_the_job_ends(monkeypatch):
    store, waits = HashStore(), []

    def pause(seconds: float) -> None:
        waits.append(all_leave([1, 2], store))
        if len(waits) > 2:
            note_leaving(len(waits) - 2, store)

    made = JobGuard(Launch("deepspeed", 0, 3, 0, None), JobStore(store, None, timedelta(seconds=100)))
    monkeypatch.setattr(ending, "time", SimpleNamespace(sleep=pause, monotonic=time.monotonic))
    fails(made, ConfigError("the value is odd"), monkeypatch)
    assert waits == [False] * 4 and all_leave([0, 1, 2], store)


def test_a_rank_that_leaves_with_another_one_s_failure_lets_the_host_go(monkeypatch):
    store = HashStore()
    made = JobGuard(Launch("deepspeed", 1, 2, 1, None), JobStore(store, None, timedelta(seconds=100)))
    left = []
    monkeypatch.setattr(made._ending, "leave", lambda report, mark: left.append((report, all_leave([1], store))))
    first = Failure(0, "n0", "gradient", "the value is odd", 2)
    first.report(store)
    wait_until(lambda: left, "left")
    assert left == [(first, True)]
    made._watcher.close()


def test_a_marker_is_the_failed_rank_s_own_though_another_one_was_faster(tmp_path, monkeypatch):
    """It alone has the whole message; the others have what the store may carry."""
    made = JobGuard(Launch("deepspeed", 1, 2, 1, None), JobStore(HashStore(), None, timedelta(seconds=100)))
    made.write_to(tmp_path)
    report = Failure.report

    def reported(failure: Failure, store: HashStore) -> Failure:
        first = report(failure, store)
        first.mark(tmp_path, "FAILED")
        return first

    monkeypatch.setattr(Failure, "report", reported)
    fails(made, DataError("row 3 says 'secret'"), monkeypatch)
    assert "secret" in (tmp_path / "FAILED").read_text()


@pytest.mark.parametrize("links", [True, False])
def test_a_marker_appears_as_a_whole_and_the_first_one_stays(tmp_path, monkeypatch, links):
    link, seen = os.link, []

    def looks(source: Path, target: Path) -> None:
        seen.append((Path(source).read_text(), Path(target).exists()))
        if not links:
            raise OSError(errno.EPERM, "Operation not permitted")
        link(source, target)

    monkeypatch.setattr(os, "link", looks)
    for rank in (1, 0):
        Failure(rank, f"n{rank}", "gradient", "the value is odd", 2).mark(tmp_path, "FAILED")
    assert seen[0] == ("rank 1 on n1, gradient\nthe value is odd\n", False)
    assert (tmp_path / "FAILED").read_text() == seen[0][0]
    assert [path.name for path in tmp_path.iterdir()] == ["FAILED"], "no file is left"


@pytest.mark.multiprocess
def test_success_ends_all_with_zero(tmp_path):
    codes, outputs = run(tmp_path, "fine", "fine", "fine")
    assert codes == [0, 0, 0] and "ERROR" not in "".join(outputs)

"""How one rank's failure ends another rank, with processes that know nothing but the job's store."""

import json
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import timedelta

import pytest
from jobs import free_port
from torch.distributed import HashStore

from deca_ds.errors import ConfigError, DataError, public_message, whole_message
from deca_ds.launch.launcher import ClientLayout, Launch
from deca_ds.launch.store import JobStore
from deca_ds.watchdog.failure import Failure, is_lost_connection, lost_connection
from deca_ds.watchdog.guard import JobGuard
from deca_ds.watchdog.heartbeats import Heartbeat

WORKER = """
import os, sys, threading, time
from pathlib import Path
from deca_ds.watchdog.guard import guarded
from deca_ds.watchdog.role import Elasticity, Visitor
from deca_ds.watchdog.stop import StopByCommit
from deca_ds.launch.launcher import ClientLayout, Launch
from deca_ds.launch.store import open_job_store
from deca_ds.launch.view import Membership, View
from deca_ds.errors import ConfigError, DataError

rank, port, what, output = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
launch = Launch("deepspeed", rank, 3, rank, ("127.0.0.1", port))
visitor = Visitor(host=0) if what == "visits" else None
with guarded(launch, open_job_store(launch, 60), visitor) as guard:
    guard.write_to(output)
    if what == "wait":
        time.sleep(60)
    elif what == "user":
        raise ConfigError("the value is odd", where="some.key", fix="make it even")
    elif what == "slow":  # long after the report is in the store, the message is still being put together
        from deca_ds.watchdog import guard as module

        module.whole_message = lambda error: time.sleep(3) or "told in full"
        raise RuntimeError("a defect")
    elif what == "data":
        raise DataError("row 3 says 'secret'")
    elif what == "bug":
        raise RuntimeError("a defect")
    elif what == "second bug":
        from deca_ds.watchdog.failure import Failure

        while Failure.reported(guard.store.store) is None:
            time.sleep(0.01)
        raise RuntimeError("a defect")
    elif what == "vanish":
        import os
        time.sleep(5)  # until the others are connected
        os._exit(7)
    elif what == "stopped":
        import os, signal, subprocess
        while len(list(output.glob("ready*"))) < 2:
            time.sleep(0.1)
        subprocess.Popen(["sh", "-c", f"sleep 20; kill -CONT {os.getpid()}"])
        (output / "stops").touch()
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(7)
    elif what == "out":  # put out by the others, which the main thread does not come to learn of
        cut_off = threading.Event()
        guard.progress.watch(ClientLayout(3, 1), 3.0)
        membership = Membership(View.of_all(3))
        guard.enter_elastic(Elasticity(membership, ClientLayout(3, 1), StopByCommit(), cut_off=cut_off))
        guard.let_others_go_on()
        cut_off.set()
        time.sleep(60)
    elif what == "visits":  # and nobody moves on, nor is anybody put out
        import deca_ds.watchdog.guard as module

        module._OTHERS_S = 3.0
        guard.progress.watch(ClientLayout(3, 1), 3.0)
        guard.progress.wait_for("all")
        time.sleep(60)
    elif what == "through":
        time.sleep(15)
        os._exit(0)
    elif what == "idle":
        (output / f"ready{rank}").touch()
        while not (output / "stops").exists():
            time.sleep(0.05)
        guard.progress.tick()
        guard.progress.timeout_s = 4.0
        time.sleep(60)
"""


def run(tmp_path, *what: str) -> tuple[list[int], list[str]]:
    port = free_port()
    command = lambda rank: [sys.executable, "-c", WORKER, str(rank), str(port), what[rank], str(tmp_path)]  # noqa: E731
    processes = [
        subprocess.Popen(command(rank), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(3)
    ]
    try:
        outputs = [process.communicate(timeout=100)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], outputs


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


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError(GLOO), "the connection to rank 1 on n1 broke off: it was killed"),
        (RuntimeError("a defect"), "Traceback"),
        (ConfigError("Broken pipe"), "Broken pipe"),
    ],
)
def test_a_connection_that_broke_is_told_as_what_it_means(error, words, monkeypatch):
    """To all ranks, by the name of who is at the other end, and not by the traceback of whom it hit."""
    store, left = HashStore(), []
    made = JobGuard(Launch("deepspeed", 0, 2, 0, None), JobStore(store, None, timedelta(seconds=20)))
    made.progress.watch(ClientLayout(1, 2), 60.0)
    store.set("heartbeat/1", json.dumps(asdict(Heartbeat(1, "n1", 0, "gradient", 3, "", None, 0.1, time.time()))))
    monkeypatch.setattr(made, "_leave", left.append)
    try:
        raise error
    except Exception as caught:
        made.fail(caught)
    (told,) = left
    assert words in told.message and told.code == (2 if isinstance(error, ConfigError) else 1)
    if words.startswith("the connection"):
        assert "Traceback" not in told.message and GLOO in told.message and "dmesg" in told.message
        assert Failure.reported(store).message == told.message
    made._finished.set()


def test_one_of_several_ranks_may_be_at_the_other_end():
    assert is_lost_connection(RuntimeError("Read error: Connection reset by peer"))
    said = lost_connection(RuntimeError(GLOO), "rank 1 on n0, rank 3 on n1")
    assert said.startswith("the connection to one of rank 1 on n0, rank 3 on n1 broke off: that rank was killed")


def test_an_interrupt_is_one_line_without_a_traceback():
    for message in (public_message(KeyboardInterrupt()), whole_message(KeyboardInterrupt())):
        assert message.startswith("interrupted (SIGINT)") and "\n" not in message


@pytest.mark.multiprocess
def test_a_rank_0_that_vanishes_ends_the_others(tmp_path):
    codes, outputs = run(tmp_path, "vanish", "wait", "wait")
    assert codes == [7, 1, 1]
    assert "rank 0 is gone" in outputs[1] + outputs[2]


@pytest.mark.multiprocess
def test_a_rank_that_is_out_of_the_job_ends_though_it_hangs(tmp_path):
    codes, outputs = run(tmp_path, "through", "out", "through")
    assert codes[1] == -9 and "client 1 ends" in outputs[1] and "its main thread hangs" in outputs[1]
    assert "its main thread hangs" in (tmp_path / "FAILED_client_001").read_text()


@pytest.mark.multiprocess
def test_a_rank_that_waits_to_be_let_in_gives_up_alone(tmp_path):
    codes, outputs = run(tmp_path, "through", "visits", "through")
    assert (codes[0], codes[1]) == (0, 2) and "no progress for" in outputs[1]
    assert "no progress" not in outputs[0] + outputs[2] and "rank 1" not in outputs[0] + outputs[2]


@pytest.mark.multiprocess
def test_a_rank_0_that_is_stopped_as_a_process_ends_the_others(tmp_path):
    """It takes the store along, which answers nothing, and takes every connection."""
    codes, outputs = run(tmp_path, "stopped", "idle", "idle")
    assert codes == [7, 2, 2]
    for output in outputs[1:]:
        assert "no answer for" in output and "look at rank 0: it is stopped as a process" in output
    assert "from the job's store, which rank 0 hosts" in (tmp_path / "FAILED").read_text()


@pytest.mark.multiprocess
def test_success_ends_all_with_zero(tmp_path):
    codes, outputs = run(tmp_path, "fine", "fine", "fine")
    assert codes == [0, 0, 0] and "ERROR" not in "".join(outputs)

"""Ranks that do not start are named soon, in the store and before MPI has started."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import preloaded
import pytest
from jobs import REPOSITORY, free_port, run_command

from deca_ds.errors import LaunchError
from deca_ds.launch.given import Given
from deca_ds.launch.launcher import Launch
from deca_ds.launch.meet import meet, silence
from deca_ds.launch.store import JobStore, open_job_store


def meet_all(launches: list[Launch], stores: list[JobStore]) -> None:
    others = zip(launches[1:], stores[1:], strict=True)
    threads = [threading.Thread(target=meet, args=(*each, 100)) for each in others]
    for thread in threads:
        thread.start()
    meet(launches[0], stores[0], 100)
    for thread in threads:
        thread.join(100)
        assert not thread.is_alive()


def test_the_first_rank_names_those_that_do_not_come():
    port = free_port()
    launches = [Launch("deepspeed", rank, 3, 0, ("127.0.0.1", port)) for rank in range(3)]
    stores = [open_job_store(launch, 600, 100) for launch in launches]
    with pytest.raises(LaunchError, match=r"ranks 1, 2 did not start within 0.2 s; 1 of 3 ranks are there") as caught:
        meet(launches[0], stores[0], 0.2)
    assert "deca doctor --hostfile" in str(caught.value) and "cluster.meet_s" in str(caught.value)
    meet_all(launches, stores)
    assert stores[1].store.timeout.total_seconds() == 600, "later waits have their own time limit"


def test_ranks_of_a_second_job_with_the_same_port_change_nothing_in_the_first():
    port = free_port()
    first = [Launch("deepspeed", rank, 2, 0, ("127.0.0.1", port)) for rank in range(2)]
    stores = [open_job_store(launch, 600, 100) for launch in first]
    third = Launch("deepspeed", 2, 3, 0, ("127.0.0.1", port))
    with pytest.raises(LaunchError, match=rf"which has 2 ranks instead of 3\n.*MASTER_PORT={port}\n"):
        open_job_store(third, 600, 100)
    meet_all(first, stores)
    keys = stores[0].store.num_keys()
    with pytest.raises(LaunchError, match=r"^rank 1 on .* the store of another job, which has its rank 1 already"):
        open_job_store(first[1], 600, 100)
    assert stores[0].store.num_keys() == keys


def test_a_job_that_may_have_got_a_rank_of_another_one_does_not_start():
    port = free_port()
    launches = [Launch("deepspeed", rank, 2, 0, ("127.0.0.1", port)) for rank in range(2)]
    stores = [open_job_store(launch, 600, 100) for launch in launches]
    with pytest.raises(LaunchError, match="has its rank 1 already"):
        open_job_store(launches[1], 600, 100)
    stores[1].store.set("meet/1", "n1")
    with pytest.raises(LaunchError, match="two processes have come as rank 1: one is of another job"):
        meet(launches[0], stores[0], 100)


def test_hosts_are_named_where_the_launcher_tells_them():
    launch = Launch("deepspeed", 0, 6, 0, ("n0", 1))
    given = Given(hosts=("n0", "n0", "n1", "n1", "n2", "n2"))
    assert silence([4, 5], launch, given, 60) == (
        "host n2: ranks 4, 5 did not start within 60 s; 4 of 6 ranks are there"
    )
    assert silence([1, 2, 3], launch, given, 60).startswith("hosts n0 (in part), n1: ranks 1, 2, 3 did")
    assert silence([5], launch, Given(), 60).startswith("rank 5 did not")


def test_a_first_rank_that_is_not_there_costs_no_more_than_meeting():
    started = time.monotonic()
    with pytest.raises(LaunchError, match="check that rank 0 runs") as caught:
        open_job_store(Launch("deepspeed", 1, 2, 1, ("127.0.0.1", free_port())), 600, 1)
    assert "deca doctor" in str(caught.value) and time.monotonic() - started < 300


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("given", "code", "told"),
    [
        ((None, ("n0", "n1"), False), 1, "meeting the other ranks: host n1: rank 1 did not start within 0.3 s"),
        (("/x/hostz", ("localhost",), True), 2, "deepspeed was given the hostfile '/x/hostz', which is not there"),
    ],
)
def test_a_rank_ends_with_the_host_that_is_silent_or_the_hostfile_that_is_not_there(given, code, told):
    rank = {"RANK": 0, "WORLD_SIZE": len(given[1]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    keys = ["model.path=x", "data.train=[x.jsonl]", "cluster.clients=2", "cluster.meet_s=0.3"]
    worker = Path(__file__).with_name("meet_worker.py")
    environment = {key: str(value) for key, value in rank.items()}
    finished = run_command([*preloaded.PYTHON, str(worker), *keys], GIVEN=json.dumps(given), **environment)
    assert finished.code == code, finished.output
    assert finished.output.count("ERROR") == 1 and told in finished.output


WAITS = """
import time
from deca_ds.launch.launcher import Launch
from deca_ds.launch.mpi_start import starting
launch = Launch("openmpi", 0, 4, 0, None)
with starting(launch, 600):
    pass
with starting(launch, 0.2):
    time.sleep(600)
"""


def test_mpi_that_waits_for_others_is_ended():
    ended = subprocess.run([sys.executable, "-c", WAITS], cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert ended.returncode == -signal.SIGKILL
    told = ended.stderr
    assert "ERROR: rank 0 on" in told and "not all 4 MPI ranks came within 0.2 s" in told and "deca doctor" in told

"""The same checks over gloo and over MPI, in real processes: bit-identical to the in-process transport."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import gossip_worker
import pytest
import torch
from jobs import preloaded_server
from preloaded import ADDRESS, PYTHON
from torch.distributed import TCPStore

from deca_ds.errors import GossipError
from deca_ds.launch.launcher import ClientLayout
from deca_ds.transport.collectives import all_reduce_sum, barrier, gather_json
from deca_ds.transport.gloo import GlooTransport
from deca_ds.transport.local import LocalNetwork
from deca_ds.transport.mpi import MpiTransport
from deca_ds.transport.polling import poll
from deca_ds.transport.transport import Endpoint

CLIENTS, DEADLINE_S = 3, 120
WORKER = str(Path(gossip_worker.__file__))
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}


@pytest.fixture(scope="module")
def local() -> list[dict]:
    """The results of threads, the reference."""
    network, everybody = LocalNetwork(CLIENTS), threading.Barrier(CLIENTS)

    def body(client: int) -> dict:
        transport = network.transport(client)
        result = gossip_worker.checks(transport, lambda: _hold(network, everybody))
        return json.loads(json.dumps(result))

    piece = gossip_worker.collectives.REDUCE_PIECE
    try:
        with ThreadPoolExecutor(CLIENTS) as pool:
            return list(pool.map(body, range(CLIENTS)))
    finally:
        gossip_worker.collectives.REDUCE_PIECE = piece


def _hold(network: LocalNetwork, everybody: threading.Barrier) -> None:
    everybody.wait(DEADLINE_S)
    network.timeout_s = 0.5  # the silent neighbour is what comes after the first hold


def run_until_done(commands: list[list[str]]) -> None:
    """Run the commands side by side; fail with their output if one fails or the deadline passes."""
    environment = ENVIRONMENT | {ADDRESS: preloaded_server().address}
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in commands
    ]
    try:
        outputs = [process.communicate(timeout=DEADLINE_S)[0] for process in processes]
        assert [process.returncode for process in processes] == [0] * len(commands), "\n".join(outputs)
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()  # mpirun ends its ranks on this
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def compare(folder: Path, local: list[dict]) -> list[dict]:
    results = [json.loads((folder / f"{client}.json").read_text()) for client in range(CLIENTS)]
    for result, reference in zip(results, local, strict=True):
        for key in reference:
            assert result[key] == reference[key], key
    assert "no message from rank 1 (client 1) within 0.5 s (tag 99)" in results[0]["silent"]
    return results


def test_local_results_are_what_they_should_be(local: list[dict]):
    assert len({result["sum torch.float32"] for result in local}) == 1
    assert local[2]["sum of one"] == 3.0
    assert [value["client"] for value in local[0]["json"]] == [0, 1, 2]
    assert local[1]["bfloat16"] == [0.5] * 5


@pytest.mark.multiprocess
def test_gloo_processes_are_bit_identical_to_threads(local: list[dict], tmp_path: Path):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    run_until_done(
        [
            [*PYTHON, WORKER, "torch", str(tmp_path), str(client), str(CLIENTS), str(store.port)]
            for client in range(CLIENTS)
        ]
    )
    compare(tmp_path, local)


@pytest.mark.multiprocess
def test_mpi_processes_are_bit_identical_to_threads(local: list[dict], tmp_path: Path):
    mpirun = shutil.which(
        "mpirun", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    )
    if mpirun is None:
        pytest.skip("no mpirun")
    run_until_done([[mpirun, "--oversubscribe", "-n", str(CLIENTS), *PYTHON, WORKER, "mpi", str(tmp_path)]])
    for client, result in enumerate(compare(tmp_path, local)):
        sender = (client - 1) % CLIENTS
        said = f"from rank {sender} (client {sender}) does not fit (tag 5): got 8 bytes, expected 12"
        assert said in result["short"]


def test_one_client_needs_no_gloo_group():
    transport = GlooTransport(None, Endpoint(ClientLayout(1, 1), 0, timeout_s=1))
    x = torch.tensor([1.5])
    all_reduce_sum(transport, x)
    barrier(transport)
    assert x.item() == 1.5 and gather_json(transport, {"a": 1}) == [{"a": 1}]
    transport.close()


def test_a_client_that_does_not_join_ends_the_wait():
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=1))
    with pytest.raises(GossipError, match=r"not all 2 ranks joined the gossip group within 0\.5 s"):
        GlooTransport(store, Endpoint(ClientLayout(2, 1), 0, timeout_s=0.5))


def test_importing_the_package_does_not_start_mpi():
    script = "import sys, deca_ds.transport.mpi, deca_ds.gossip.strategies; sys.exit('mpi4py.MPI' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, timeout=DEADLINE_S).returncode == 0


def test_poll_gives_up_at_the_deadline():
    assert not poll(lambda: False, deadline=0.0)
    answers = iter([False] * 300 + [True])
    assert poll(lambda: next(answers), deadline=float("inf"))


class Request:
    """One of MPI's that is through the second time it is asked."""

    def __init__(self):
        self.asked = 0

    def Test(self, status):
        self.asked += 1
        return self.asked > 1


def test_starting_a_message_moves_on_what_is_under_way(monkeypatch):
    """MPI does so only while it is called, and between two waits the trainer computes."""
    request = Request()
    mpi = SimpleNamespace(
        Exception=RuntimeError,
        BYTE=None,
        ERRORS_RETURN=None,
        Status=lambda: SimpleNamespace(Get_count=lambda kind: 12),
    )
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=mpi))  # no MPI in this process
    comm = SimpleNamespace(Set_errhandler=lambda handler: None, Irecv=lambda *message: request)
    comm.Idup = lambda: (comm, SimpleNamespace(Test=lambda: True))
    transport = MpiTransport(comm, Endpoint(ClientLayout(2, 1), 0, timeout_s=60))
    exchange = transport.exchange(torch.empty(0), [], {1: torch.empty(3)}, 7)
    assert request.asked == 1
    exchange.wait()
    assert request.asked == 2

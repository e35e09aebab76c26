"""What a client's ranks tell DeepSpeed and torch of the device that they have taken."""

import os
from datetime import timedelta

import pytest
import torch
from torch.distributed import HashStore

from deca_ds.config import load_config
from deca_ds.launch import world
from deca_ds.launch.devices import Placement
from deca_ds.launch.launcher import ClientLayout, Launch
from deca_ds.launch.store import JobStore
from deca_ds.launch.view import Membership, View

SEEN = {"LOCAL_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "3", "RANK": "7", "WORLD_SIZE": "9"}


@pytest.fixture
def opened(monkeypatch):
    """What the world of a rank is opened with that is the fourth of its host."""
    for name, value in SEEN.items():
        monkeypatch.setenv(name, value)

    def connect(device: str, ranks: int) -> dict:
        arguments: dict = {}
        placement = Placement(torch.device(device), 3, 1)
        monkeypatch.setattr(world, "take_device", lambda *_: (placement, None))
        monkeypatch.setattr(world, "take_threads", lambda *_: None)
        monkeypatch.setattr(world.dist, "init_process_group", lambda **given: arguments.update(given))
        config = load_config(None, ["model.path=x", f"cluster.ranks=[{ranks}]", "cluster.transport=torch"])
        store = JobStore(HashStore(), None, timedelta(seconds=10))
        world.connect(config, Launch("deepspeed", 0, ranks, 3, None), store)
        return arguments

    return connect


@pytest.mark.parametrize(("device", "local_rank"), [("cuda:0", "0"), ("cuda:3", "3"), ("cpu", "3")])
def test_deepspeed_sees_the_number_of_the_device_and_not_that_on_the_host(opened, device, local_rank):
    """It calls set_device(LOCAL_RANK), where a process may see one GPU only, and wants Open MPI to say the same."""
    opened(device, 1)
    assert os.environ["LOCAL_RANK"] == os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] == local_rank
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "1")


@pytest.mark.parametrize(
    ("device", "ranks", "backend", "bound"),
    [("cuda:1", 2, "nccl", torch.device("cuda:1")), ("cuda:1", 1, "nccl", None), ("cpu", 2, "gloo", None)],
)
def test_a_device_is_bound_where_several_ranks_have_gpus(opened, device, ranks, backend, bound):
    """Binding that of a single rank is known to hang."""
    arguments = opened(device, ranks)
    assert (arguments["backend"], arguments["device_id"]) == (backend, bound)
    assert (arguments["rank"], arguments["world_size"]) == (0, ranks)


@pytest.mark.parametrize(
    ("device", "given", "expected"),
    [
        ("cuda:0", {}, "0"),
        ("cuda:0", {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}, "1"),
        ("cuda:0", {"NCCL_ASYNC_ERROR_HANDLING": "1"}, None),
        ("cpu", {}, None),
    ],
)
def test_torch_leaves_what_nccl_loses_to_the_watcher_unless_users_want_it(opened, monkeypatch, device, given, expected):
    for name in world._NCCL_ERRORS:
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    opened(device, 2)
    assert os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING") == expected


@pytest.mark.parametrize(("device", "closed"), [("cuda:0", 1), ("cpu", 0)])
def test_a_world_of_nccl_is_closed_before_the_interpreter_ends(monkeypatch, device, closed):
    calls: list[str] = []
    monkeypatch.setattr(world.dist, "destroy_process_group", lambda: calls.append(device))
    cluster = world.Cluster(
        Launch("deepspeed", 0, 1, 0, None), ClientLayout(1, 1), JobStore(HashStore(), None, timedelta(seconds=10)),
        torch.device(device), None, Membership(View(0, (0,), 1)),
    )  # fmt: skip
    cluster.close_world()
    assert len(calls) == closed

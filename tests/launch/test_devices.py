"""Where ranks compute: chosen from what they see, and refused where their client could not work so."""

import os
from datetime import timedelta
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import HashStore

from deca_ds.errors import LaunchError
from deca_ds.launch.devices import Placement, Seen, Taken, check_devices, place, shared_gpus, take_device, take_threads
from deca_ds.launch.launcher import ClientLayout, Launch
from deca_ds.launch.store import JobStore


def ranks_on(machine: str, count: int, *, local: bool = True, gpus: int = 0, cores: str = "ff") -> list[Seen]:
    return [Seen(machine, machine, rank if local else None, cores, gpus) for rank in range(count)]


def placed(seen: list[Seen]) -> list[str]:
    every = dict(enumerate(seen))
    return [str(place(every, rank).device) for rank in every]


def test_ranks_take_the_gpus_of_their_host_in_turn():
    assert placed(ranks_on("a", 2, gpus=2) + ranks_on("b", 2, gpus=2)) == ["cuda:0", "cuda:1"] * 2
    assert placed(ranks_on("a", 4, gpus=2)) == ["cuda:0", "cuda:1"] * 2


def test_a_process_that_sees_one_gpu_takes_it():
    assert placed(ranks_on("a", 3, gpus=1)) == ["cuda:0"] * 3


@pytest.mark.parametrize("named", [(), (0,)])
def test_ranks_are_counted_where_the_launcher_has_not(named):
    """Also where it has for some: their number could be that of another rank."""
    seen = ranks_on("a", 2, local=False, gpus=4) + ranks_on("b", 3, local=False, gpus=4)
    for rank in named:
        seen[rank] = ranks_on("a", 1, gpus=4)[0]
    assert placed(seen) == ["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:2"]


def test_containers_of_one_machine_are_counted_together():
    seen = [Seen(name, "machine", None, "f", 2) for name in ("one", "two")]
    assert placed(seen) == ["cuda:0", "cuda:1"]


@pytest.mark.parametrize(
    ("cores", "threads"),
    [
        (["ff", "ff"], [4, 4]),  # both may run on the same eight
        (["f", "f0"], [4, 4]),  # bound, four each
        (["1", "2"], [1, 1]),
        (["ff"] * 3, [2, 2, 2]),
        (["1", "1"], [1, 1]),
    ],
)
def test_threads_follow_the_cores_that_a_rank_may_run_on(cores, threads):
    every = {rank: Seen("a", "a", rank, mask, 0) for rank, mask in enumerate(cores)}
    assert [place(every, rank).threads for rank in every] == threads


@pytest.mark.parametrize(
    ("wanted", "environ", "threads"),
    [
        (None, {}, 4),
        (3, {}, 3),
        (None, {"OMP_NUM_THREADS": "2"}, None),  # what torch has started with
        (3, {"OMP_NUM_THREADS": "2"}, 3),
        (None, {"OMP_NUM_THREADS": ""}, 4),
        (None, {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, 4),  # torchrun's, not the user's
        (None, {"OMP_NUM_THREADS": "2", "TORCHELASTIC_RUN_ID": "x"}, None),
    ],
)
def test_threads_that_the_user_has_set_count(monkeypatch, wanted, environ, threads):
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    take_threads(wanted, Placement(torch.device("cpu"), 0, 4), environ)
    assert chosen == ([] if threads is None else [threads])


def taken(*devices: str) -> dict[int, Taken]:
    """Written HOST/DEVICE/IDENTITY."""
    return {rank: Taken(*device.split("/")) for rank, device in enumerate(devices)}


def test_clients_may_share_a_gpu_and_are_told():
    devices, layout = taken("a/cuda:0/X", "a/cuda:1/Y", "a/cuda:0/X", "a/cuda:1/Y"), ClientLayout(2, 2)
    check_devices(devices, layout)
    told = shared_gpus(devices, layout)
    assert told.splitlines()[0].startswith("one GPU for clients 0, 1 (rank 0 on a: cuda:0; rank 2 on a: cuda:0)")
    assert len(told.splitlines()) == 2
    assert shared_gpus(taken("a/cuda:0/X", "b/cuda:0/Y"), ClientLayout(2, 1)) is None
    assert shared_gpus(taken("a/cpu/", "a/cpu/"), ClientLayout(2, 1)) is None


def test_ranks_of_one_client_on_one_gpu_are_refused():
    """By the GPU, not by its number: with one visible GPU a process all of them are cuda:0."""
    check_devices(taken("a/cuda:0/X", "a/cuda:0/Y"), ClientLayout(1, 2))
    with pytest.raises(LaunchError, match=r"(?s)ranks of client 1 have one GPU: rank 2 on b: cuda:0; rank 3 on b"):
        check_devices(taken("a/cuda:0/X", "a/cuda:1/Y", "b/cuda:0/Z", "b/cuda:0/Z"), ClientLayout(2, 2))


def test_devices_of_different_types_in_one_client_are_refused():
    check_devices(taken("a/cpu/", "b/cuda:0/X"), ClientLayout(2, 1))
    with pytest.raises(LaunchError, match=r"(?s)client 0 .* GPUs \(rank 0 on a: cuda:0\) and on CPUs \(rank 1 on b"):
        check_devices(taken("a/cuda:0/X", "b/cpu/"), ClientLayout(1, 2))


def take(monkeypatch, wanted: str, gpus: int, ranks: int, layout: ClientLayout, local: int | None = None) -> list:
    """What `ranks` threads take, on a machine with GPUs that are made up. local: the launcher's number of the first."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"GPU {device.index}"))
    monkeypatch.setenv("DS_ACCELERATOR", "")
    store, found = HashStore(), [None] * ranks

    def of(rank: int) -> None:
        world, number = layout.leader_of(layout.clients), None if local is None else local + rank
        launch, job = Launch("deepspeed", rank, world, number, None), JobStore(store, None, timedelta(seconds=100))
        try:
            found[rank] = take_device(wanted, launch, layout, job, range(ranks))
        except LaunchError as error:
            found[rank] = error

    threads = [Thread(target=of, args=[rank]) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert len(current) == (ranks if gpus and wanted != "cpu" else 0)
    return found


def test_every_rank_hears_what_is_wrong(monkeypatch):
    found = take(monkeypatch, "auto", 2, 3, ClientLayout(1, 3))
    assert all(isinstance(error, LaunchError) and "have one GPU: rank 0" in str(error) for error in found)


def test_a_client_that_joins_others_is_told_where_it_cannot_know_which_gpus_are_free(monkeypatch):
    """It counts its own ranks alone."""
    (_, told), (_, same) = take(monkeypatch, "auto", 4, 2, ClientLayout(2, 2))
    assert told == same and "LOCAL_RANK is not set" in told and "takes the first GPUs (rank 0 on" in told
    for wanted, gpus, local in (("auto", 4, 2), ("auto", 1, None), ("cpu", 4, None)):
        ((placement, told),) = take(monkeypatch, wanted, gpus, 1, ClientLayout(2, 1), local)
        assert told is None
        assert str(placement.device) == ("cpu" if wanted == "cpu" else f"cuda:{local or 0}")


def test_a_rank_has_the_cores_of_its_mask_and_not_all_of_the_host(monkeypatch):
    """As Slurm, taskset and containers bind it."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 4, 5})
    ((placement, _),) = take(monkeypatch, "cpu", 0, 1, ClientLayout(1, 1))
    assert placement.threads == 3


def test_all_take_their_device_or_a_cpu(monkeypatch):
    found = take(monkeypatch, "auto", 2, 2, ClientLayout(1, 2))
    assert [str(placement.device) for placement, _ in found] == ["cuda:0", "cuda:1"]
    assert all(told is None for _, told in found) and os.environ["DS_ACCELERATOR"] == "cuda"
    found = take(monkeypatch, "auto", 1, 2, ClientLayout(2, 1))
    assert [str(placement.device) for placement, _ in found] == ["cuda:0", "cuda:0"]
    assert all(told.startswith("one GPU for clients 0, 1") for _, told in found)
    for wanted, gpus in (("cpu", 2), ("auto", 0)):
        found = take(monkeypatch, wanted, gpus, 2, ClientLayout(2, 1))
        assert [(str(p.device), p.local_rank) for p, _ in found] == [("cpu", 0), ("cpu", 1)]
        assert os.environ["DS_ACCELERATOR"] == "cpu"
    assert all("torch sees no GPU" in str(error) for error in take(monkeypatch, "cuda", 0, 1, ClientLayout(1, 1)))

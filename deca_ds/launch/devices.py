"""Which device, and how many CPU threads, every rank takes: from what it sees, what its launcher says and what the
other ranks of its host see."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from deca_ds.errors import LaunchError
from deca_ds.launch.given import look_at_hosts
from deca_ds.launch.launcher import ClientLayout, Launch
from deca_ds.launch.store import JobStore
from deca_ds.plural import first_few, named

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Seen:
    """What one rank sees before it touches a device.

    host: its name. machine: the same for all ranks on one machine, whatever names their containers have. local_rank:
    from the launcher, None where it does not say. cores: those that the rank may run on, bit by bit in hexadecimal.
    gpus: how many the process sees and may use.
    """

    host: str
    machine: str
    local_rank: int | None
    cores: str
    gpus: int


@dataclass(frozen=True)
class Taken:
    """What one rank has taken. device: type and number, such as cuda:0. identity: of that GPU, the same for every
    process that sees it; "" on a CPU."""

    host: str
    device: str
    identity: str


@dataclass(frozen=True)
class Placement:
    """Of one rank. local_rank: among those of its machine. threads: CPU threads for torch."""

    device: torch.device
    local_rank: int
    threads: int


def take_device(
    wanted: str, launch: Launch, layout: ClientLayout, store: JobStore, together: Sequence[int]
) -> tuple[Placement, str | None]:
    """Choose this rank's device and make it the current one; with it, what users should know about sharing.

    wanted: run.device. together: the ranks that are started together; all of them call this. DeepSpeed chooses its
    accelerator from DS_ACCELERATOR when it is first imported, so this must come before. Raises LaunchError for a GPU
    that is not there, and where ranks of one client would share a GPU or compute on different types of devices, which
    their collectives would wait for without end.
    """
    gpus = _usable_gpus(wanted, launch.host)
    seen = Seen(launch.host, machine(launch.host), launch.local_rank, _cores(), gpus)
    every = store.gather(launch, "devices/seen", asdict(seen), together)
    placement = place({rank: Seen(**of) for rank, of in every.items()}, launch.rank)
    os.environ["DS_ACCELERATOR"] = placement.device.type
    identity = ""
    if placement.device.type == "cuda":
        torch.cuda.set_device(placement.device)
        identity = str(torch.cuda.get_device_properties(placement.device).uuid)
    taken = store.gather(launch, "devices/taken", asdict(Taken(launch.host, str(placement.device), identity)), together)
    devices = {rank: Taken(**of) for rank, of in taken.items()}
    check_devices(devices, layout)
    return placement, shared_gpus(devices, layout) or unknown_neighbours(devices, gpus, launch, together)


def place(every: Mapping[int, Seen], rank: int) -> Placement:
    """Return where `rank` computes, by what every rank sees. Ranks of one machine take the GPUs that they see in turn,
    and share the cores with those that may run on the same ones. They are counted where the launcher has not."""
    own = every[rank]
    neighbours = [other for other, seen in sorted(every.items()) if seen.machine == own.machine]
    counted = any(every[other].local_rank is None for other in neighbours)
    local_rank = neighbours.index(rank) if counted or own.local_rank is None else own.local_rank
    device = torch.device("cuda", local_rank % own.gpus) if own.gpus else torch.device("cpu")
    sharing = sum(every[other].cores == own.cores for other in neighbours)
    return Placement(device, local_rank, max(1, int(own.cores, 16).bit_count() // sharing))


def take_threads(wanted: int | None, placement: Placement, environ: Mapping[str, str] = os.environ) -> None:
    """Have torch compute with run.threads; where that is None with OMP_NUM_THREADS, which torch has read; and without
    either with this rank's share of the cores. torchrun sets OMP_NUM_THREADS=1 where the user has set nothing."""
    given = environ.get("OMP_NUM_THREADS")
    by_torchrun = given == "1" and "TORCHELASTIC_RUN_ID" in environ
    if wanted is not None or not given or by_torchrun:
        torch.set_num_threads(wanted or placement.threads)


def check_devices(devices: Mapping[int, Taken], layout: ClientLayout) -> None:
    """Raise LaunchError where two ranks of one client have one GPU, or devices of different types."""
    of_client: dict[int, dict[int, Taken]] = defaultdict(dict)
    for rank, taken in devices.items():
        of_client[layout.client_of(rank)][rank] = taken
    for client, ranks in of_client.items():
        cpus = {rank: taken for rank, taken in ranks.items() if not taken.identity}
        if 0 < len(cpus) < len(ranks):
            gpus = {rank: taken for rank, taken in ranks.items() if taken.identity}
            raise LaunchError(
                f"client {client} would compute on GPUs ({_shown(gpus)}) and on CPUs ({_shown(cpus)})",
                where="run.device",
                fix=look_at_hosts(
                    "look at nvidia-smi where there is no GPU, and at CUDA_VISIBLE_DEVICES; or set run.device=cpu for "
                    "all of the client's ranks"
                ),
            )
        for identity, holders in _by_gpu(ranks).items():
            if identity and len(holders) > 1:
                raise LaunchError(
                    f"ranks of client {client} have one GPU: {_shown({rank: ranks[rank] for rank in holders})}",
                    where="the launcher: ranks on a host, and the GPUs that each sees",
                    fix="start at most as many ranks of a client on a host as it has GPUs, let every rank see all of "
                    "them or one of its own, or set run.device=cpu",
                )


def shared_gpus(devices: Mapping[int, Taken], layout: ClientLayout) -> str | None:
    """Return a line for each GPU that several clients compute on; None if there is none."""
    lines = [
        f"one GPU for {named('client', map(layout.client_of, ranks))} "
        f"({_shown({rank: devices[rank] for rank in ranks})}): they take turns, and its memory must hold all of them"
        for identity, ranks in _by_gpu(devices).items()
        if identity and len(ranks) > 1
    ]
    return "\n".join(lines) or None


def unknown_neighbours(devices: Mapping[int, Taken], gpus: int, launch: Launch, together: Sequence[int]) -> str | None:
    """Return a line where the ranks of a client that joins others have counted themselves, without those that compute
    on this machine already; None elsewhere. gpus: that this rank sees."""
    if gpus < 2 or launch.local_rank is not None or len(together) == len(launch.ranks):
        return None
    return (
        f"LOCAL_RANK is not set, so that this client takes the first GPUs ({_shown(devices)}), on which others may "
        "compute: set it to the rank on the host"
    )


def _by_gpu(devices: Mapping[int, Taken]) -> dict[str, list[int]]:
    ranks: dict[str, list[int]] = defaultdict(list)
    for rank, taken in sorted(devices.items()):
        ranks[taken.identity].append(rank)
    return ranks


def _shown(devices: Mapping[int, Taken]) -> str:
    parts = (f"rank {rank} on {taken.host}: {taken.device}" for rank, taken in sorted(devices.items()))
    return first_few(parts, 4, between="; ")


def _usable_gpus(wanted: str, host: str) -> int:
    if wanted == "cpu":
        return 0
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cuda" and not gpus:
        raise LaunchError(
            f"run.device=cuda, but torch sees no GPU on {host}",
            where="run.device",
            fix=look_at_hosts("set run.device=cpu, or look at nvidia-smi there"),
        )
    return gpus


def computes_on_gpu(wanted: str) -> bool:
    """Return whether a run of run.device=`wanted` that was started here would take a GPU, as far as this machine
    shows."""
    return wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available())


def machine(host: str) -> str:
    """Return a name that all processes on this machine share; `host` if the machine has none."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return host


def _cores() -> str:
    return f"{sum(1 << core for core in os.sched_getaffinity(0)):x}"

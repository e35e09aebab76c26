"""What the launcher says about this process, and which rank belongs to which client."""

from __future__ import annotations

import contextlib
import os
import socket
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from deca_ds.errors import LaunchError
from deca_ds.launch.allocation import find_allocation, scheduler_of

# Launcher -> variables for rank and world size. The first launcher that has set both wins: `deepspeed` and torchrun set
# RANK themselves, also inside an MPI or Slurm allocation.
_VARIABLES: dict[str, tuple[str, str]] = {
    "deepspeed": ("RANK", "WORLD_SIZE"),
    "openmpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "mpich": ("PMI_RANK", "PMI_SIZE"),
    "flux": ("FLUX_TASK_RANK", "FLUX_JOB_SIZE"),
    "slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
}
# (variable of the rank on its host, variable of the rank, variables of the number of ranks on its host): the others
# count only if the second equals this rank. PMI itself has no rank on the host, but the programs that set it do; and
# processes inherit the variables of a batch script's shell, which are not theirs.
_ON_HOST = (
    ("LOCAL_RANK", "RANK", ("LOCAL_SIZE", "LOCAL_WORLD_SIZE")),
    ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_RANK", ("OMPI_COMM_WORLD_LOCAL_SIZE",)),
    ("MPI_LOCALRANKID", "PMI_RANK", ("MPI_LOCALNRANKS",)),
    ("PMI_LOCAL_RANK", "PMI_RANK", ("PMI_LOCAL_SIZE",)),
    ("PALS_LOCAL_RANKID", "PALS_RANKID", ()),
    ("FLUX_TASK_LOCAL_ID", "FLUX_TASK_RANK", ()),
    ("SLURM_LOCALID", "SLURM_PROCID", ()),
)
# (variable of the number of hosts that a job has ranks on, variable of the rank, which counts as above)
_HOSTS = (("SLURM_STEP_NUM_NODES", "SLURM_PROCID"), ("FLUX_JOB_NNODES", "FLUX_TASK_RANK"))
# Launchers whose ranks may make up one MPI world.
MPI_LAUNCHERS = ("openmpi", "mpich", "flux", "slurm")
_WHERE = "environment of this process, from its launcher"


@dataclass(frozen=True)
class Launch:
    """This process among all processes of the job.

    rank, world_size: over all clients. local_rank: on this host; None if the launcher does not say. master: host and
    port that the launcher reserved for the job's store, or None under MPI. absent: ranks of the world that do not start
    with the others. spans_hosts: whether the launcher says that it has started ranks on other hosts, too.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int | None
    master: tuple[str, int] | None
    absent: frozenset[int] = frozenset()
    spans_hosts: bool = False

    @property
    def ranks(self) -> list[int]:
        """The ranks that start together, ascending."""
        return [rank for rank in range(self.world_size) if rank not in self.absent]

    @property
    def first(self) -> int:
        """The rank that hosts the job's store at the start."""
        return self.ranks[0]

    def clients(self, layout: ClientLayout) -> tuple[int, ...]:
        """Return the clients that start together, ascending."""
        return tuple(client for client in range(layout.clients) if layout.leader_of(client) not in self.absent)

    def without(self, clients: Sequence[int], layout: ClientLayout) -> Launch:
        """Return the same launch without these clients. Raises LaunchError if this rank belongs to one of them."""
        client = layout.client_of(self.rank)
        if client in clients:
            raise LaunchError(
                f"rank {self.rank} is of client {client}, which cluster.absent names",
                where="cluster.absent",
                fix="start it with --join, when the others are in training; WORLD_SIZE counts absent clients, too",
            )
        return replace(self, absent=frozenset(rank for absent in clients for rank in layout.ranks_of(absent)))

    @property
    def host(self) -> str:
        return socket.gethostname()


def read_launch(environ: Mapping[str, str] = os.environ) -> Launch:
    """Read the launcher's variables; a plain `python` start is one rank of one.

    Raises LaunchError, which names them, if they contradict each other, are incomplete or are not numbers.
    """
    for launcher, (rank_key, size_key) in _VARIABLES.items():
        if rank_key not in environ or size_key not in environ:
            continue  # the shell of a Slurm batch script has SLURM_PROCID, but no step
        rank, size = _number(environ, rank_key), _number(environ, size_key, least=1)
        if rank >= size:
            fix = f"ranks count from 0; correct the two, or unset {rank_key} for one process"
            raise LaunchError(f"{rank_key}={rank} is not below {size_key}={size}", where=_WHERE, fix=fix)
        said = [each for each in _ON_HOST if each[0] in environ and environ.get(each[1]) == environ[rank_key]]
        local_rank = next((_number(environ, key) for key, _, _ in said), None)
        sizes = (key for _, _, keys in said for key in keys if key in environ)
        on_host = next((_number(environ, key, least=1) for key in sizes), size)
        spans_hosts = size > 1 and (on_host < size or _has_hosts(environ, environ[rank_key]))
        master = None
        if "MASTER_ADDR" in environ and "MASTER_PORT" in environ:
            port = _number(environ, "MASTER_PORT", least=1, most=65535)
            master = environ["MASTER_ADDR"].strip().strip("[]"), port
        elif launcher == "deepspeed" and size > 1:
            raise LaunchError(
                f"{rank_key} and {size_key} are set, but not both MASTER_ADDR and MASTER_PORT",
                where=_WHERE,
                fix=f"set them to the address of rank 0's host and a free port there; for one process unset {rank_key}",
            )
        return Launch(launcher, rank, size, local_rank, master, spans_hosts=spans_hosts)
    if "RANK" in environ or environ.get("WORLD_SIZE", "1") != "1":
        raise LaunchError(
            "of RANK and WORLD_SIZE only one is set", where=_WHERE, fix="set both; for one process unset both"
        )
    return Launch("python", 0, 1, 0, None)


def _has_hosts(environ: Mapping[str, str], rank: str) -> bool:
    """Return whether the launcher says that the job has ranks on several hosts. PALS numbers its hosts; how many there
    are stands on the first one, in the list of PBS."""
    if any(_number(environ, key, least=1) > 1 for key, of in _HOSTS if key in environ and environ.get(of) == rank):
        return True
    if environ.get("PALS_RANKID") != rank:
        return False
    if environ.get("PALS_NODEID", "0") != "0":
        return True
    allocation = None
    if scheduler_of(environ) == "PBS":
        with contextlib.suppress(LaunchError):
            allocation = find_allocation(environ)
    return allocation is not None and len(allocation.tasks) > 1


def _number(environ: Mapping[str, str], key: str, *, least: int = 0, most: int | None = None) -> int:
    text = environ[key]
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least or (most is not None and number > most):
        expected = f"at least {least}" if most is None else f"between {least} and {most}"
        raise LaunchError(f"{key}={text} is no number {expected}", where=_WHERE, fix="correct it, or unset it")
    return number


@dataclass(frozen=True)
class ClientLayout:
    """n clients of k consecutive ranks each: client i has ranks i*k .. i*k + k-1; shard index r is its r-th rank.

    sizes: where the clients differ, the ranks of each; the clients still follow each other, and k is the largest size.
    """

    clients: int
    ranks_per_client: int
    sizes: tuple[int, ...] = ()

    @classmethod
    def of(cls, sizes: Sequence[int]) -> ClientLayout:
        """Make the layout of clients of these numbers of ranks."""
        return cls(len(sizes), max(sizes), tuple(sizes) if len(set(sizes)) > 1 else ())

    @property
    def even(self) -> bool:
        """Whether all clients have as many ranks, so that shards of one index are alike in all of them."""
        return not self.sizes

    def client_of(self, rank: int) -> int:
        """Return the client that a rank of the job belongs to."""
        if self.even:
            return rank // self.ranks_per_client
        return bisect_right(list(accumulate(self.sizes)), rank)

    def shard_of(self, rank: int) -> int:
        """Return the shard index of a rank of the job: its place within its client."""
        return rank - self.leader_of(self.client_of(rank))

    def leader_of(self, client: int) -> int:
        """Return the rank that speaks for the client: its first one."""
        return client * self.ranks_per_client if self.even else sum(self.sizes[:client])

    def ranks_of(self, client: int) -> range:
        """Return the client's ranks, as they are numbered over the job."""
        first = self.leader_of(client)
        return range(first, first + (self.ranks_per_client if self.even else self.sizes[client]))

    def partners(self, rank: int, client: int) -> range:
        """Return the ranks of another client that `rank` may exchange shards with: the one of its index, or all."""
        if not self.even:
            return self.ranks_of(client)
        partner = self.leader_of(client) + self.shard_of(rank)
        return range(partner, partner + 1)

    def group_of(self, rank: int) -> int:
        """Return the number of the group of ranks that exchange with each other: their index where the clients are of
        one size; else 0, as all ranks are one group."""
        return self.partners(rank, 0).start

    def named(self, rank: int) -> str:
        """Name a rank in a message: `rank 3 (client 1)`."""
        return f"rank {rank} (client {self.client_of(rank)})"

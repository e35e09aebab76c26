"""One torch.distributed world per client, and the sub-communicator that joins the clients' ranks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store

from deca_ds.config import Config
from deca_ds.config.checks import check_world
from deca_ds.errors import ConfigError, LaunchError
from deca_ds.launch.devices import take_device, take_threads
from deca_ds.launch.launcher import MPI_LAUNCHERS, ClientLayout, Launch
from deca_ds.launch.progress import EVERYBODY, Progress
from deca_ds.launch.store import JobStore
from deca_ds.launch.view import Membership, View
from deca_ds.printing import print_wrapped

if TYPE_CHECKING:
    from mpi4py import MPI

_OPEN_MPI_LOCAL_RANK = "OMPI_COMM_WORLD_LOCAL_RANK"
_ULFM_VARIABLE = "OMPI_MCA_mpi_ft_enable"
_NCCL_ERRORS = ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "NCCL_ASYNC_ERROR_HANDLING")  # of torch; the old name counts, too


@dataclass(frozen=True)
class Cluster:
    """Where this process stands: client `client`, shard index `shard` of its `ranks`.

    The default torch process group is this client's own world, in which `shard` is the rank. gossip_comm: the MPI
    communicator of this rank's group (ClientLayout.group_of), in rank order; None where gossip goes over torch.
    membership: who is in. progress: what this rank is doing. client_store: this client's own, None where its leader
    does not host one. together: the ranks that start now.
    """

    launch: Launch
    layout: ClientLayout
    store: JobStore
    device: torch.device
    gossip_comm: MPI.Comm | None
    membership: Membership
    progress: Progress = field(default_factory=Progress)
    client_store: Store | None = None
    together: Sequence[int] = ()

    @property
    def members(self) -> View:
        """Who is in now."""
        return self.membership.view

    @property
    def client(self) -> int:
        return self.layout.client_of(self.launch.rank)

    @property
    def shard(self) -> int:
        return self.layout.shard_of(self.launch.rank)

    @property
    def clients(self) -> int:
        return self.layout.clients

    @property
    def ranks(self) -> int:
        """Ranks of this client (k)."""
        return len(self.layout.ranks_of(self.client))

    @property
    def is_leader(self) -> bool:
        """Whether this rank speaks for its client."""
        return self.shard == 0

    @property
    def is_job_leader(self) -> bool:
        """Whether this rank speaks for the job: the leader of the first client that is left."""
        return self.is_leader and self.client == self.members.first

    @property
    def transport(self) -> str:
        return "mpi" if self.gossip_comm is not None else "torch"

    def close_world(self) -> None:
        """Close this client's world, if it is NCCL's; all of the client's ranks call this after their last collective.
        Torch would abort it when the interpreter ends, where nobody watches."""
        if self.device.type == "cuda":
            dist.destroy_process_group()

    def gather_in_client(self, value: Any) -> list[Any]:
        """Gather what each rank of this client gives, by shard; small objects, which stay within the client."""
        every: list[Any] = [None] * self.ranks
        dist.all_gather_object(every, value)
        return every


def connect(
    config: Config,
    launch: Launch,
    store: JobStore,
    progress: Progress | None = None,
    *,
    joins: Sequence[int] | None = None,
) -> Cluster:
    """Choose the device, build this client's world and the gossip communicator.

    joins: for a client that comes to others that run already, so that its ranks alone are started together: these
    others.
    progress: the guard's; from here on its watcher ends waits in which nobody moves on for cluster.timeout_s. Without
    it every wait has that deadline of its own.
    Raises ConfigError where the ranks do not fit the clients, LaunchError where the device or transport that is
    asked for is not there.
    """
    layout = ClientLayout.of(check_world(config, launch.world_size))
    transport = choose_transport(config.cluster.transport, launch)
    if progress is None:
        progress = Progress()
    else:
        progress.watch(layout, config.cluster.timeout_s)
    progress.enter("connecting")
    client, shard = layout.client_of(launch.rank), layout.shard_of(launch.rank)
    own = layout.ranks_of(client)
    together = launch.ranks if joins is None else own
    placement, shared = take_device(config.run.device, launch, layout, store, together)
    if shared is not None and launch.rank == together[0]:
        print_wrapped(f"WARNING: {shared}")
    device = placement.device
    take_threads(config.run.threads, placement)
    key = f"client/{client}/store"
    # hosted by the client itself: what happens to other clients does not concern its collectives
    client_store = store.publish_server(key) if shard == 0 else store.join_server(key)
    _set_environment(shard, len(own), placement.local_rank if device.index is None else device.index)
    _open_world(client_store, shard, len(own), device, progress.deadline_s(config.cluster.timeout_s))
    comm = None
    if transport == "mpi":
        from mpi4py import MPI

        progress.wait_for(EVERYBODY)
        comm = MPI.COMM_WORLD.Split(color=layout.group_of(launch.rank), key=launch.rank)
    membership = Membership(View(0, launch.clients(layout) if joins is None else tuple(joins), layout.clients))
    return Cluster(launch, layout, store, device, comm, membership, progress, client_store, together)


def _set_environment(rank: int, ranks: int, local_rank: int) -> None:
    """Have DeepSpeed and its helpers see the client's world as the whole. local_rank: of the device."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(local_rank))
    if _OPEN_MPI_LOCAL_RANK in os.environ:
        os.environ[_OPEN_MPI_LOCAL_RANK] = str(local_rank)  # DeepSpeed insists that both are the same


def _open_world(store: Store, rank: int, ranks: int, device: torch.device, timeout_s: float) -> None:
    """Make the client's world, the default process group of its ranks. timeout_s: of its collectives.

    By default torch aborts a process when NCCL has lost a rank, maybe before the watcher has told who is gone. Without
    that the collective never ends, and the watcher does.
    """
    on_gpu = device.type == "cuda"
    if on_gpu and not any(name in os.environ for name in _NCCL_ERRORS):
        os.environ[_NCCL_ERRORS[0]] = "0"
    dist.init_process_group(
        backend="nccl" if on_gpu else "gloo",
        store=PrefixStore("world", store),
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=timeout_s),
        device_id=device if on_gpu and ranks > 1 else None,  # one rank has no communicator to bind
    )


def choose_transport(wanted: str, launch: Launch) -> str:
    """Return "mpi" or "torch"; "auto" takes MPI where MPI.COMM_WORLD spans all ranks of the job.

    Raises LaunchError if MPI is asked for and the launcher made no MPI world.
    """
    if wanted == "torch":
        return "torch"
    if launch.launcher in MPI_LAUNCHERS and launch.world_size > 1:
        from mpi4py import MPI

        if launch.world_size == MPI.COMM_WORLD.size:
            return "mpi"
    if wanted == "mpi":
        raise LaunchError(
            f"cluster.transport=mpi, but {launch.launcher} started {launch.world_size} rank(s) without an MPI world",
            where="cluster.transport",
            fix="start with 'mpirun -n N python launchers/train.py ...' or with 'deepspeed --hostfile HOSTS "
            "--launcher openmpi --force_multi launchers/train.py ...', or set cluster.transport=torch",
        )
    return "torch"


def check_on_failure(config: Config, launch: Launch, edges: bool) -> None:
    """Raise LaunchError or ConfigError where cluster.on_failure=continue cannot be kept. edges: whether clients mix."""
    if config.cluster.on_failure == "stop":
        return
    if config.cluster.clients < 2 or not edges:
        raise ConfigError(
            "cluster.on_failure=continue, but there are no clients that average with each other",
            where="cluster.on_failure",
            fix="set cluster.on_failure=stop; clients without a graph can as well be jobs of their own",
        )
    if config.cluster.return_s and choose_transport(config.cluster.transport, launch) == "mpi":
        raise LaunchError(
            f"cluster.return_s = {config.cluster.return_s:g}, but over MPI no process can join a job that runs",
            where="cluster.return_s",
            fix="leave it out, or start every client by itself, over torch",
        )
    if config.cluster.absent and choose_transport(config.cluster.transport, launch) == "mpi":
        raise LaunchError(
            f"cluster.absent = {list(config.cluster.absent)}, but over MPI no process can join a job that runs",
            where="cluster.absent",
            fix="leave it out, or start every client by itself, over torch",
        )
    if (why := _ends_together(config, launch)) is not None:
        raise LaunchError(
            f"cluster.on_failure=continue, but {why}",
            where="cluster.on_failure",
            fix="start with 'mpirun --with-ft ulfm -n N python launchers/train.py ...' (Open MPI 5), or every client "
            "by itself with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, or set cluster.on_failure=stop",
        )


def _ends_together(config: Config, launch: Launch) -> str | None:
    """Return why all ranks end when one does; None if they do not."""
    if launch.launcher in ("openmpi", "mpich") or choose_transport(config.cluster.transport, launch) == "mpi":
        if os.environ.get(_ULFM_VARIABLE, "").lower() in ("1", "true"):  # set by mpirun --with-ft ulfm
            return None
        return "this MPI job ends when one of its ranks dies: it was started without fault tolerance (ULFM)"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun ends all ranks when one fails"
    if os.environ.get("CROSS_SIZE") == "1":
        return "deepspeed ends all ranks of a host when one fails, and here all ranks are on one host"
    return None

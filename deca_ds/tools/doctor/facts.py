"""What the doctor has learnt, before anything is made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from deca_ds.config.hub import Kind
from deca_ds.errors import UserError
from deca_ds.tools.doctor.links import Link
from deca_ds.tools.doctor.sights import Folder, Sight

PACKAGES = ("torch", "deepspeed", "transformers")  # of which all ranks must have the same version
OTHERS = ("mpi4py", "datasets", "accelerate", "numpy", "safetensors", "omegaconf")
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "OMPI_MCA_btl_tcp_if_include")
STORE_PORT = 29500  # deepspeed's default
DEADLINE_S = 60.0  # for an answer, unless told


@dataclass(frozen=True)
class Clock:
    """Seconds that a host's clock is ahead of this machine's, and how far off that may be."""

    ahead_s: float
    error_s: float


@dataclass(frozen=True)
class HostFacts:
    """One host. addresses: of its name, seen from here; None where nobody asked. sight: None if it does not answer, and
    then why and what ssh said. wrong_paths: of the configuration, what is wrong with them. not_on_hub: the same of
    names of the hub, and what to do. output: where run.output is or will be. left: the file that it has left there.
    sees: hosts whose files it sees there, itself included."""

    slots: int = 1
    addresses: Sequence[str] | None = None
    sight: Sight | None = None
    fault: str = ""
    said: str = ""
    clock: Clock | None = None
    wrong_paths: Mapping[str, str] = field(default_factory=dict)
    not_on_hub: Mapping[str, Sequence[str]] = field(default_factory=dict)
    output: Folder | None = None
    left: str = ""
    sees: frozenset[str] = frozenset()


@dataclass(frozen=True)
class MpiTrial:
    """A start of a few processes by mpirun. size: of MPI.COMM_WORLD in them, None if they did not come so far."""

    processes: int
    size: int | None
    error: str = ""


@dataclass(frozen=True)
class Needs:
    """What a configuration wants of the hosts. refused: why a start would not take run.output as this machine sees it.
    paths: host -> (key, path) of files that ranks there read. disk: bytes that a host's ranks write in run.output.
    memory: bytes that they hold at least on CPUs; gpu_memory, beside_gpus: on GPUs, and on the host then. pairs: of
    hosts that send each other messages. names: key, kind and name of what all ranks have from the hub. unplanned: why
    disk and memory are empty, if so."""

    output: str
    resume: str
    refused: UserError | None
    transport: str
    device: str
    mixed_versions: bool
    paths: Mapping[str, Sequence[tuple[str, str]]]
    disk: Mapping[str, int] = field(default_factory=dict)
    memory: Mapping[str, int] = field(default_factory=dict)
    gpu_memory: Mapping[str, int] = field(default_factory=dict)
    beside_gpus: Mapping[str, int] = field(default_factory=dict)
    pairs: Sequence[tuple[str, str]] = ()
    names: Sequence[tuple[str, Kind, str]] = ()
    unplanned: UserError | None = None


@dataclass(frozen=True)
class EnvironmentFile:
    """A .deepspeed_env with its lines."""

    path: str
    lines: Sequence[str]


@dataclass(frozen=True)
class Facts:
    """Everything. here: this machine. remote: whether launchers reach the hosts over ssh. links: by the host that
    connects and the one that listens. mistake: why the configuration has no plan. sees_first: whether this
    machine sees what the first host writes in run.output. scheduler: in whose job this process is, where the hosts are
    those of the job. unlisted: in which one, where nothing has told its hosts. by_srun: whether they were reached by
    srun instead of ssh."""

    hosts: Mapping[str, HostFacts]
    here: Sight
    remote: bool
    port: int = STORE_PORT
    links: Mapping[tuple[str, str], Link] = field(default_factory=dict)
    mpi: MpiTrial | None = None
    environment_files: Sequence[EnvironmentFile] = ()
    needs: Needs | None = None
    mistake: UserError | None = None
    sees_first: bool = False
    scheduler: str | None = None
    unlisted: str | None = None
    by_srun: bool = False

    @property
    def seen(self) -> dict[str, Sight]:
        """The hosts that answer, with what they say."""
        return {name: host.sight for name, host in self.hosts.items() if host.sight is not None}

    @property
    def alike(self) -> dict[str, Sight]:
        """Those of them whose python is this one, so that its packages count."""
        return {name: sight for name, sight in self.seen.items() if sight["python"] == self.here["python"]}

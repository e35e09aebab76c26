"""Part of the agent: what one host says of itself. Nothing here raises for what a host has not got."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import importlib.util
import os
import platform
import resource
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from deca_ds.launch.digests import code_digest, version_of

_SIOCGIFADDR, _SIOCGIFNETMASK = 0x8915, 0x891B
_LINK_LOCAL = "20"  # a scope in /proc/net/if_inet6
_MPI = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"
_TORCH = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"


class Interface(TypedDict):
    """A network interface that is up. addresses: with their networks, as 10.0.0.1/24."""

    name: str
    addresses: list[str]


class Sight(TypedDict):
    """What one host says. "" and 0: there is none. Sizes in bytes, but -1: without limit.

    code: digest of deca_ds there, in the folder code_at. folder: whether the working folder of here is there. gpus:
    name, driver and memory of each. torch_gpus: how many torch may use, -1: there are none to ask about. names:
    what names stand for there. variables: of the environment. port: why the port of the store cannot be taken. fabric:
    InfiniBand or similar devices. memory: free, shared: size of /dev/shm.
    """

    hostname: str
    python: str
    version: str
    packages: dict[str, str]
    code: str
    code_at: str
    folder: bool
    gpus: list[str]
    gpu_error: str
    torch_gpus: int
    mpi: str
    mpi_error: str
    mpirun: str
    interfaces: list[Interface]
    names: dict[str, list[str]]
    variables: dict[str, str]
    port: str
    fabric: list[str]
    files: int
    locked: int
    shared: int
    memory: int


def look(
    folder: str, packages: Sequence[str], names: Sequence[str], variables: Sequence[str], port: int, tool_s: float
) -> Sight:
    """folder: the working folder. names: to look up. port: to try, 0: none. tool_s: for nvidia-smi and the
    like, 0: start none of them."""
    there = os.path.isdir(folder)
    if there:
        os.chdir(folder)
    code, code_at = _code()
    gpus, gpu_error = _gpus(tool_s) if tool_s else ([], "")
    mpi, mpi_error = "", "no mpi4py"
    if tool_s and version_of("mpi4py"):
        mpi, mpi_error = _run([sys.executable, "-c", _MPI], tool_s)
    mpirun = tool("mpirun") if tool_s else None
    torch_gpus = _run([sys.executable, "-c", _TORCH], tool_s)[0] if gpus else ""
    return Sight(
        hostname=socket.gethostname(),
        python=sys.executable,
        version=platform.python_version(),
        packages={name: version_of(name) for name in packages},
        code=code,
        code_at=code_at,
        folder=there,
        gpus=gpus,
        gpu_error=gpu_error,
        torch_gpus=int(torch_gpus) if torch_gpus.isdigit() else -1,
        mpi=mpi.split(",")[0].strip("\0 "),
        mpi_error=mpi_error,
        mpirun=_first_line(_run([mpirun, "--version"], tool_s)[0]) if mpirun else "",
        interfaces=_interfaces(),
        names={name: addresses(name) for name in {*names, socket.gethostname()}},
        variables={name: os.environ[name] for name in variables if name in os.environ},
        port=_port_taken(port) if port else "",
        fabric=sorted(path.name for path in _children("/sys/class/infiniband")),
        files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        locked=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        shared=shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0,
        memory=_memory(),
    )


def tool(name: str) -> str | None:
    """Return the program of this name beside this python, or in PATH."""
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def addresses(name: str) -> list[str]:
    """Return what a name stands for on this host; [] if nothing."""
    try:
        return list(dict.fromkeys(str(found[4][0]) for found in socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)))
    except (OSError, UnicodeError):
        return []


def _code() -> tuple[str, str]:
    """Return digest and folder of the package, without importing it."""
    spec = importlib.util.find_spec("deca_ds")
    if spec is None or spec.origin is None:
        return "", ""
    root = Path(spec.origin).parent
    return code_digest(root), str(root)


def _gpus(tool_s: float) -> tuple[list[str], str]:
    """Return a line for each GPU, and why there is none where there should be one."""
    if shutil.which("nvidia-smi") is None:
        return [], ""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    out, error = _run(query, tool_s)
    return [line.strip() for line in out.splitlines() if line.strip()], error


def _run(command: Sequence[str], within_s: float) -> tuple[str, str]:
    """Run a program; return what it prints, and what went wrong."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMPI_", "PMIX_", "PMI_"))}
    try:
        ended = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=within_s, env=environment
        )
    except subprocess.TimeoutExpired:
        return "", f"{os.path.basename(command[0])} did not end within {within_s:g} s"
    except OSError as error:
        return "", str(error)
    if ended.returncode == 0:
        return ended.stdout, ""
    lines = (ended.stderr.strip() or ended.stdout.strip()).splitlines()
    return "", lines[-1] if lines else f"ended with {ended.returncode}"


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _interfaces() -> list[Interface]:
    found: dict[str, list[str]] = {name: [] for _, name in socket.if_nameindex() if _up(name)}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asks:
        for name, own in found.items():
            request = struct.pack("256s", name.encode()[:15])
            with contextlib.suppress(OSError):  # without an IPv4 address
                address = socket.inet_ntoa(fcntl.ioctl(asks, _SIOCGIFADDR, request)[20:24])
                mask = fcntl.ioctl(asks, _SIOCGIFNETMASK, request)[20:24]
                own.append(f"{address}/{bin(int.from_bytes(mask, 'big')).count('1')}")
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            address, _, bits, scope, _, name = line.split()
            if name in found and scope != _LINK_LOCAL:
                found[name].append(f"{socket.inet_ntop(socket.AF_INET6, bytes.fromhex(address))}/{int(bits, 16)}")
    return [Interface(name=name, addresses=own) for name, own in found.items() if own]


def _up(name: str) -> bool:
    try:
        return Path("/sys/class/net", name, "operstate").read_text().strip() != "down"
    except OSError:
        return True


def _children(folder: str) -> list[Path]:
    return list(Path(folder).iterdir()) if os.path.isdir(folder) else []


def _port_taken(port: int) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("", port))
            tried.listen(1)
        except OSError as error:
            return error.strerror or str(error)
    return ""


def _memory() -> int:
    """Return the bytes that programs may use: the host's free memory, or what its control group leaves."""
    free = 0
    with contextlib.suppress(OSError, ValueError):
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / file).read_text()) for file in ("memory.max", "memory.current"))
        cache = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(cache["inactive_file"]) + int(cache["active_file"]))
    return free


def there(paths: Sequence[str]) -> dict[str, str]:
    """Path -> what is wrong with it; "": this process can read it. A pattern such as data/*.jsonl needs one match."""
    return {path: _unreadable(path) for path in paths}


def _unreadable(path: str) -> str:
    found = (
        glob.glob(path, recursive=True) if any(sign in path for sign in "*?[") and not os.path.lexists(path) else [path]
    )
    if not found or not os.path.exists(found[0]):
        return "is not there"
    return "" if all(os.access(each, os.R_OK) for each in found) else "cannot be read"


class Folder(TypedDict):
    """Of one host: at: the folder that exists, or the nearest one above. error: why nothing can be written. holds:
    names of what is in the folder itself."""

    at: str
    free: int
    error: str
    holds: list[str]


def write(folder: str, name: str) -> Folder:
    """Leave an empty file of this name in a folder, or in the nearest one above that is there; see `forget`."""
    at = Path(folder).absolute()
    while not at.is_dir() and at != at.parent:
        at = at.parent
    error, holds = "", []
    try:
        holds = os.listdir(folder) if os.path.isdir(folder) else []
        os.close(os.open(at / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except OSError as failed:
        error = failed.strerror or str(failed)
    return Folder(at=str(at), free=shutil.disk_usage(at).free, error=error, holds=holds)


def see(folder: str, names: Sequence[str]) -> list[str]:
    """Return which of the files that others have left are here."""
    return [name for name in names if os.path.lexists(os.path.join(folder, name))]


def forget(folder: str, name: str) -> None:
    """Remove what `write` has left."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(folder, name))

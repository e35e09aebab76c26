"""The hosts of the batch job that this process is in, as Slurm, Flux, PBS or LSF tell them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from deca_ds.errors import LaunchError, in_words

# Scheduler -> variables of which it sets one in its jobs. The first that has set one wins: Flux may run inside a job of
# another.
_VARIABLES = {
    "Flux": ("FLUX_JOB_ID", "FLUX_ENCLOSING_ID"),
    "Slurm": ("SLURM_JOB_NODELIST",),
    "PBS": ("PBS_NODEFILE",),
    "LSF": ("LSB_DJOB_HOSTFILE", "LSB_HOSTS"),
}
# Scheduler -> a variable that tells of its job where none of those above came along, as into a container. Of the last
# four the hosts are not read.
_JOBS = {
    "Slurm": "SLURM_JOB_ID",
    "PBS": "PBS_JOBID",
    "LSF": "LSB_JOBID",
    "Grid Engine": "PE_HOSTFILE",
    "Cobalt": "COBALT_JOBID",
    "OAR": "OAR_JOB_ID",
    "the Fujitsu scheduler": "PJM_JOBID",
}
_FLUX_S = 30.0
_RANGE = re.compile(r"(\d+)(?:-(\d+))?", re.ASCII)
_REPEATED = re.compile(r"(\d+)(?:\(x(\d+)\))?", re.ASCII)  # a number, or 4(x2) for twice 4


@dataclass(frozen=True)
class Allocation:
    """scheduler: its name. tasks: host -> how many tasks the job has there; 1 each where the scheduler does not say,
    and `told` is false."""

    scheduler: str
    tasks: Mapping[str, int]
    told: bool


def scheduler_of(environ: Mapping[str, str]) -> str | None:
    """Return the name of the scheduler whose job this process is in, None outside of one."""
    return next((name for name, keys in _VARIABLES.items() if any(environ.get(key) for key in keys)), None)


def unlisted_job(environ: Mapping[str, str]) -> str | None:
    """Name the scheduler's job that this process is in where nothing tells its hosts; None outside of such a job."""
    if scheduler_of(environ) is not None:
        return None
    for scheduler, key in _JOBS.items():
        if environ.get(key):
            missing = " or ".join(_VARIABLES.get(scheduler, ()))
            return f"a job of {scheduler} ({key}={environ[key]})" + (f" without {missing}" if missing else "")
    return None


def find_allocation(environ: Mapping[str, str], *, flux_s: float = _FLUX_S) -> Allocation | None:
    """Return the hosts of the job that this process is in, None outside of one. flux_s: for flux to answer. Raises
    LaunchError where its scheduler does not tell them."""
    scheduler = scheduler_of(environ)
    if scheduler == "Flux":
        return Allocation(
            scheduler, dict.fromkeys(expand_hosts(_ask_flux(flux_s), "flux hostlist local"), 1), told=False
        )
    if scheduler == "Slurm":
        return _of_slurm(environ)
    if scheduler == "PBS":
        return _of_slots(scheduler, _read(environ, "PBS_NODEFILE"), "PBS_NODEFILE")
    if scheduler == "LSF":
        file = "LSB_DJOB_HOSTFILE"
        if environ.get(file):
            return _of_slots(scheduler, _read(environ, file), file)
        return _of_slots(scheduler, environ["LSB_HOSTS"].split(), "LSB_HOSTS")
    return None


def _of_slurm(environ: Mapping[str, str]) -> Allocation:
    """Slurm counts tasks per host also where nobody asked for tasks; then they are CPUs."""
    hosts = expand_hosts(environ["SLURM_JOB_NODELIST"], "SLURM_JOB_NODELIST")
    each = environ.get("SLURM_TASKS_PER_NODE", "").split(",") if "SLURM_NTASKS" in environ else []
    repeated = [found for text in each if (found := _REPEATED.fullmatch(text))]
    counts = [int(found[1]) for found in repeated for _ in range(int(found[2] or 1))]
    told = len(counts) == len(hosts)  # a step may have fewer hosts than its job
    return Allocation("Slurm", dict(zip(hosts, counts if told else [1] * len(hosts), strict=True)), told)


def _of_slots(scheduler: str, names: list[str], where: str) -> Allocation:
    """names: a host for each slot. Where every host is there once, nobody asked for more slots, or for any."""
    if not names:
        raise _unknown(scheduler, "there are no hosts in it", where)
    slots = Counter(names)
    return Allocation(scheduler, dict(slots), told=max(slots.values()) > 1)


def _read(environ: Mapping[str, str], key: str) -> list[str]:
    """Return the words of the file that a variable names."""
    try:
        return Path(environ[key]).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        scheduler = scheduler_of(environ) or key
        raise _unknown(
            scheduler, f"cannot read the list of the job's hosts: {in_words(error)}", f"{key}={environ[key]}"
        ) from None


def _ask_flux(within_s: float) -> str:
    """Return the hosts of the Flux job or instance around this process, in one list."""
    command = ["flux", "hostlist", "local"]
    if shutil.which(command[0]) is None:
        raise _unknown("Flux", "there is no program flux in PATH", "flux hostlist local")
    try:
        ended = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=within_s, check=False
        )
    except subprocess.TimeoutExpired:
        what = f"flux does not tell the job's hosts within {within_s:g} s"
        raise _unknown("Flux", what, "flux hostlist local") from None
    except OSError as error:
        raise _unknown("Flux", f"flux does not start: {error.strerror}", "flux hostlist local") from None
    if ended.returncode:
        said = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
        raise _unknown("Flux", f"flux does not tell the job's hosts: {said}", "flux hostlist local")
    return ended.stdout.strip()


def expand_hosts(text: str, where: str) -> list[str]:
    """Return the hosts of a list as Slurm and Flux write it: `n[01-03,7],gpu1` is n01, n02, n03, n07 and gpu1.

    Raises LaunchError, which names `where`, if it is no such list.
    """
    hosts = [host for name in _split(text) for host in _expand(name, where)]
    if not hosts:
        raise LaunchError("the list of the job's hosts is empty", where=where, fix="name them with --hostfile")
    return list(dict.fromkeys(hosts))


def _split(text: str) -> list[str]:
    """Split a list at the commas outside of its brackets."""
    return [name for name in re.split(r",(?![^\[]*\])|\s+", text) if name]


def _expand(name: str, where: str) -> Iterator[str]:
    """Expand the brackets of one name, the last ones fastest. Numbers keep the width of a range's first one."""
    parts = re.split(r"\[([^\[\]]*)\]", name)
    if any(sign in part for part in parts[::2] for sign in "[]"):
        raise _no_list(name, where)
    choices: list[list[str]] = []
    for place, part in enumerate(parts):
        if place % 2 == 0:
            choices.append([part])
            continue
        numbers: list[str] = []
        for each in part.split(","):
            found = _RANGE.fullmatch(each)
            if found is None or int(found[2] or found[1]) < int(found[1]):
                raise _no_list(name, where)
            low, high = found[1], found[2] or found[1]
            numbers += [str(number).zfill(len(low)) for number in range(int(low), int(high) + 1)]
        choices.append(numbers)
    return map("".join, product(*choices))


def _no_list(name: str, where: str) -> LaunchError:
    return LaunchError(f"{name[:80]!r} is no list of hosts", where=where, fix="name the hosts with --hostfile")


def _unknown(scheduler: str, what: str, where: str) -> LaunchError:
    fix = f"name the hosts with --hostfile, or start it where {scheduler} starts the job's script"
    return LaunchError(what, where=where, fix=fix)

"""Checks of what is installed: packages, deca_ds itself, accelerators and MPI."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from deca_ds.tools.doctor.facts import OTHERS, PACKAGES, Facts
from deca_ds.tools.doctor.findings import HERE, Verdict, check, fail, ok, warn

_VERSION = re.compile(r"\d+(\.\d+)+")
_VENDORS = (("Open MPI", r"Open ?MPI"), ("Intel MPI", r"Intel"), ("MPICH", r"MPICH|HYDRA|hydra"))


def _most(values: Iterable[str]) -> str:
    return Counter(values).most_common(1)[0][0]


@check("packages")
def packages(facts: Facts) -> Iterator[Verdict]:
    """Check for the same versions as here."""
    own = facts.here["packages"]
    for host, sight in facts.alike.items():
        missing = [name for name in (*PACKAGES, *OTHERS) if own.get(name) and not sight["packages"].get(name)]
        odd = [name for name in (*PACKAGES, *OTHERS) if sight["packages"].get(name) not in ("", None, own.get(name))]
        told = ", ".join(f"{name} {sight['packages'][name]} (here {own.get(name) or 'none'})" for name in odd)
        matter = [name for name in odd if name in PACKAGES]
        tolerated = facts.needs is not None and facts.needs.mixed_versions
        if missing:
            yield fail(host, f"lacks {', '.join(missing)}", "install what constraints.txt lists")
        elif matter and not tolerated:
            fix = "install the same versions everywhere, or set cluster.allow_mixed_versions=true if they fit"
            yield fail(host, told, fix)
        elif odd:
            yield warn(host, told, "install the same versions everywhere")
        else:
            yield ok(host, ", ".join(f"{name} {own[name]}" for name in PACKAGES if own.get(name)))


@check("deca_ds")
def code(facts: Facts) -> Iterator[Verdict]:
    """Check for the same source files as here, as the job's own comparison wants them."""
    for host, sight in facts.alike.items():
        if not sight["code"]:
            yield fail(host, "deca_ds is not installed", "install it into the virtual environment there")
        elif sight["code"] != facts.here["code"]:
            what = f"other source files of deca_ds ({sight['code']}, here {facts.here['code']}) in {sight['code_at']}"
            yield fail(host, what, "install the same deca_ds everywhere")
        else:
            yield ok(host, sight["code"])


@check("accelerator")
def accelerator(facts: Facts) -> Iterator[Verdict]:
    """GPUs as the driver and as torch see them, and the same on all hosts."""
    usual = _most([", ".join(gpu.split(",")[0] for gpu in sight["gpus"][:1]) for sight in facts.seen.values()] or [""])
    for host, sight in facts.seen.items():
        gpus, slots = sight["gpus"], facts.hosts[host].slots
        if facts.needs is not None and facts.needs.device == "cpu":
            yield ok(host, "CPU, as run.device says")
        elif sight["gpu_error"]:
            yield fail(host, f"nvidia-smi: {sight['gpu_error']}", "look at the driver; a reboot after its update helps")
        elif not gpus and facts.needs is not None and facts.needs.device == "cuda":
            yield fail(host, "no GPU, but run.device=cuda", "look at nvidia-smi there, or set run.device=auto")
        elif not gpus and usual:
            yield fail(host, f"no GPU; others have {usual}", "look at nvidia-smi there, or leave the host out")
        elif not gpus:
            yield ok(host, "CPU")
        elif 0 <= sight["torch_gpus"] < len(gpus):
            fix = "install the torch build for this driver, and look at CUDA_VISIBLE_DEVICES"
            yield fail(host, f"torch can use {sight['torch_gpus']} of {len(gpus)} GPUs", fix)
        elif slots > len(gpus):
            fix = "give the host as many slots as it has GPUs: ranks of a client cannot share one"
            yield warn(host, f"{slots} slots for {len(gpus)} GPUs", fix)
        elif len(set(gpus)) > 1 or gpus[0].split(",")[0] != usual:
            yield warn(host, f"GPUs differ: {', '.join(sorted(set(gpus)))}; others have {usual}", "expect the slowest")
        else:
            yield ok(host, f"{len(gpus)} x {gpus[0]}")


def vendor(text: str) -> tuple[str, str]:
    """Return which MPI a line is about, and its version."""
    name = next((name for name, pattern in _VENDORS if re.search(pattern, text)), text.split(",")[0][:30])
    found = _VERSION.search(text)
    return name, found[0] if found else ""


@check("MPI")
def mpi(facts: Facts) -> Iterator[Verdict]:
    """Check the library that mpi4py finds, the mpirun of the host, and whether both belong together. Only
    cluster.transport=mpi cannot do without."""
    wrong = fail if facts.needs is not None and facts.needs.transport == "mpi" else warn
    away = "or do without: cluster.transport=torch"
    libraries = {host: vendor(sight["mpi"]) for host, sight in facts.alike.items() if sight["mpi"]}
    for host, sight in facts.alike.items():
        if not sight["mpi"]:
            if wrong is fail or libraries:
                yield wrong(host, f"mpi4py finds no MPI library: {sight['mpi_error'][:90]}", f"install one, {away}")
            else:
                yield ok(host, "none; torch carries the messages")
            continue
        library, launcher = libraries[host], vendor(sight["mpirun"]) if sight["mpirun"] else None
        usual = _most(" ".join(of) for of in libraries.values())
        if launcher is not None and launcher != library:
            what = f"mpi4py uses {' '.join(library)}, but mpirun is of {' '.join(launcher)}"
            yield wrong(host, what, f"use the mpirun of the library, {away}")
        elif " ".join(library) != usual:
            yield wrong(host, f"{' '.join(library)}, most hosts have {usual}", f"install the same MPI, {away}")
        elif launcher is None:
            yield ok(host, f"{' '.join(library)}, no mpirun in PATH")
        else:
            yield ok(host, " ".join(library))


@check("MPI world")
def mpi_world(facts: Facts) -> Iterator[Verdict]:
    """Check whether mpirun's processes are one COMM_WORLD, tried from here."""
    trial = facts.mpi
    if trial is None:
        return
    host = HERE if facts.remote else next(iter(facts.hosts))
    wrong = fail if facts.needs is not None and facts.needs.transport == "mpi" else warn
    away = "or do without: cluster.transport=torch"
    if trial.size is None:
        fix = "mend what it says"
        if "root" in trial.error:
            fix = "set OMPI_ALLOW_RUN_AS_ROOT=1 and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"
        elif "within" in trial.error:
            fix = "name the interface in OMPI_MCA_btl_tcp_if_include, and look at the firewall"
        yield wrong(host, f"mpirun -n {trial.processes} failed: {trial.error}", f"{fix}, {away}")
    elif trial.size != trial.processes:
        what = f"mpirun starts {trial.processes} processes, each in a world of {trial.size}"
        yield wrong(host, what, f"build mpi4py for this MPI, or use its library's own mpirun, {away}")
    else:
        yield ok(host, f"spans {trial.size} processes")

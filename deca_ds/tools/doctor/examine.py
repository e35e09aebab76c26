"""Ask all hosts at once for everything that the rules look at."""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations, pairwise

from deca_ds.errors import LaunchError, UserError, in_words
from deca_ds.tools.doctor.environment_file import hub_variables, read_environment_files
from deca_ds.tools.doctor.facts import (
    INTERFACE_VARIABLES,
    OTHERS,
    PACKAGES,
    STORE_PORT,
    Clock,
    Facts,
    HostFacts,
    MpiTrial,
    Needs,
)
from deca_ds.tools.doctor.hosts import Host, Unreachable, at_once, by_srun, command, is_this_machine, resolve
from deca_ds.tools.doctor.links import Link
from deca_ds.tools.doctor.sights import Sight, tool

_OWN = ""  # the agent of this machine, beside those of the hosts
_CLOCK_READINGS = 5  # the quickest one counts
_ALL_PAIRS = 6  # hosts of whom every two are tried, where no configuration names neighbours
_STREAM_S = 0.4  # that a connection is timed
_LINK_S = 5.0  # for a connection to be made
_WORLD = "from mpi4py import MPI; MPI.COMM_WORLD.Barrier(); print('size', MPI.COMM_WORLD.size)"
_MPI_S = 30.0
_TOOLS = 5  # that an agent starts one after the other at most, and one in reserve
_END_S = 5.0  # for mpirun to end what it has started


def examine(
    slots: Mapping[str, int],
    within_s: float,
    needs: Needs | None,
    mistake: UserError | None = None,
    *,
    port: int = STORE_PORT,
    scheduler: str | None = None,
    briefly: bool = False,
) -> Facts:
    """slots: host -> ranks; all are asked over ssh, or by srun in a job of Slurm, unless there is only one, which is
    this machine. within_s: for each answer. scheduler: see Facts. briefly: only what the checks in `BRIEF` need, which
    starts no programs and no connections between hosts, and writes nothing. Raises LaunchError where not even this
    machine answers."""
    remote = len(slots) > 1 or not is_this_machine(next(iter(slots)), within_s / 4)
    names = [*slots, *([_OWN] if remote else [])]
    own = _OWN if remote else names[0]
    found = resolve(list(slots), within_s / 4) if remote else {}
    environment = read_environment_files(os.environ) if scheduler is None else []
    tool_s = 0.0 if briefly else within_s / _TOOLS
    names_of_hub = [] if needs is None else [(kind, name) for _, kind, name in needs.names]
    of_hub = {"names": names_of_hub, "environment": hub_variables(environment) if remote else {}}
    agents = {name: Host(command(None if name == own else name, scheduler), within_s) for name in names}
    try:

        def look(name: str) -> HostFacts:
            of = HostFacts(slots=slots.get(name, 1), addresses=found.get(name))
            asked = [path for _, path in needs.paths.get(name, ())] if needs is not None else []
            try:
                tried = port if name == names[0] and not briefly else 0
                sight = _look(agents[name], list(slots) if remote else [], tried, tool_s)
                wrong = agents[name].ask("there", paths=asked)
                lacking = agents[name].ask("not_on_hub", **of_hub) if of_hub["names"] and name in slots else {}
                return replace(of, sight=sight, clock=_clock(agents[name]), wrong_paths=wrong, not_on_hub=lacking)
            except (Unreachable, OSError) as error:
                return _silent(of, error)

        hosts = at_once(look, names)
        here = hosts[own].sight
        if here is None:
            fault = f"this machine's own python: {hosts[own].fault}"
            raise LaunchError(fault, where="deca doctor", fix="raise its --deadline")
        hosts.pop(_OWN, None)
        if briefly:
            return Facts(hosts, here, remote, environment_files=environment, needs=needs, scheduler=scheduler)
        sees_first = False
        answering = {name: agents[name] for name, of in hosts.items() if of.sight is not None}
        if needs is not None:
            hosts = _share(hosts, answering, needs.output)
            sees_first = names[0] in answering and _sees(agents[own], hosts[names[0]])
        pairs = needs.pairs if needs is not None else _pairs(list(slots))
        links = _links([pair for pair in pairs if set(pair) <= answering.keys()], answering, found)
    finally:
        at_once(lambda name: agents[name].close(), names)
    facts = Facts(
        hosts,
        here,
        remote,
        port,
        links,
        None,
        environment,
        needs,
        mistake,
        sees_first,
        scheduler,
        by_srun=by_srun(scheduler),
    )
    with_mpi = [name for name, sight in facts.alike.items() if sight["mpi"]]
    return replace(facts, mpi=_try_mpi(here, with_mpi if remote else None, min(within_s, _MPI_S)))


def _silent(of: HostFacts, error: Unreachable | OSError) -> HostFacts:
    """Return what is known of a host that has not answered."""
    return replace(of, sight=None, fault=str(error), said=getattr(error, "said", ""))


def _look(agent: Host, names: Sequence[str], port: int, tool_s: float) -> Sight:
    sight: Sight = agent.ask(
        "look",
        folder=os.getcwd(),
        packages=[*PACKAGES, *OTHERS],
        names=list(names),
        variables=list(INTERFACE_VARIABLES),
        port=port,
        tool_s=tool_s,
    )
    return sight


def _clock(agent: Host) -> Clock:
    readings = []
    for _ in range(_CLOCK_READINGS):
        before = time.time()
        there = agent.ask("clock")
        after = time.time()
        readings.append(Clock(there - (before + after) / 2, (after - before) / 2))
    return min(readings, key=lambda reading: reading.error_s)


def _share(hosts: Mapping[str, HostFacts], agents: Mapping[str, Host], output: str) -> dict[str, HostFacts]:
    """Have every host write a file into run.output and look for those of the others."""
    names = {name: f".deca-doctor-{secrets.token_hex(8)}" for name in agents}
    found = dict(hosts)

    def leave(name: str) -> HostFacts:
        try:
            folder = agents[name].ask("write", folder=output, name=names[name])
            holds = [each for each in folder["holds"] if each not in names.values()]
            return replace(hosts[name], output=folder | {"holds": holds}, left=names[name])
        except (Unreachable, OSError) as error:
            return _silent(hosts[name], error)

    found |= at_once(leave, list(agents))

    def see(name: str) -> HostFacts:
        folder = found[name].output
        if folder is None or folder["error"]:
            return found[name]
        try:
            seen = agents[name].ask("see", folder=folder["at"], names=list(names.values()))
        except (Unreachable, OSError) as error:
            return _silent(found[name], error)
        return replace(found[name], sees=frozenset(of for of, file in names.items() if file in seen))

    return found | at_once(see, list(agents))


def _sees(own: Host, first: HostFacts) -> bool:
    """Return whether this machine sees the file that the first host has left in run.output."""
    if first.output is None or first.output["error"]:
        return False
    try:
        return bool(own.ask("see", folder=first.output["at"], names=[first.left]))
    except (Unreachable, OSError):
        return False


def _pairs(hosts: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs of hosts to try without a configuration: all, or of many hosts each with the next and the
    first."""
    if len(hosts) <= _ALL_PAIRS:
        return list(combinations(hosts, 2))
    near = [*pairwise(hosts), *((hosts[0], host) for host in hosts[2:])]
    return list(dict.fromkeys(near))


def rounds(pairs: Sequence[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """Return the pairs in groups in which no host is twice, so that no two of them share its interface."""
    groups: list[list[tuple[str, str]]] = []
    for pair in pairs:
        free = (group for group in groups if not any(set(pair) & set(other) for other in group))
        group = next(free, None)
        if group is None:
            groups.append([pair])
        else:
            group.append(pair)
    return groups


def _links(
    pairs: Sequence[tuple[str, str]], agents: Mapping[str, Host], found: Mapping[str, Sequence[str]]
) -> dict[tuple[str, str], Link]:
    measured: dict[tuple[str, str], Link] = {}

    def try_link(pair: tuple[str, str]) -> Link:
        one, other = pair
        address = next(iter(found.get(other) or ()), other)
        token = secrets.token_hex(16)
        try:
            at = agents[other].ask("listen", address=address, token=token, within_s=2 * _LINK_S + _STREAM_S)
        except OSError as error:
            return Link(error=f"{other} cannot listen at {address}, its name's address: {in_words(error)}")
        except Unreachable as error:
            return Link(error=f"{other} no longer answers: {error}")
        try:
            asked = {"address": address, "port": at, "token": token, "seconds": _STREAM_S, "within_s": _LINK_S}
            link: Link = agents[one].ask("measure", **asked)
        except (OSError, Unreachable) as error:
            return Link(error=f"{one} no longer answers: {in_words(error)}")
        return link

    for group in rounds(pairs):
        named = {f"{one} {other}": (one, other) for one, other in group}
        results = at_once(lambda key, named=named: try_link(named[key]), list(named))  # type: ignore[misc]
        measured |= {named[key]: link for key, link in results.items()}
    return {pair: measured[pair] for pair in pairs}


def _try_mpi(here: Sight, hosts: Sequence[str] | None, within_s: float) -> MpiTrial | None:
    """Try MPI with two processes here, or one on each of `hosts`; None without mpirun or mpi4py, or if there is nothing
    to try."""
    mpirun = tool("mpirun")
    if mpirun is None or not here["mpi"]:
        return None
    processes, where = 2, ["--oversubscribe"]
    if hosts is not None:
        if "Open MPI" not in here["mpirun"] or len(hosts) < 2:
            return None
        processes = len(hosts)
        where = ["--host", ",".join(f"{name}:1" for name in hosts), "--map-by", "ppr:1:node"]
    if "Open MPI" not in here["mpirun"]:
        where = []
    trial = subprocess.Popen(
        [mpirun, "-n", str(processes), *where, sys.executable, "-c", _WORLD],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, said = trial.communicate(timeout=within_s)
    except subprocess.TimeoutExpired:
        trial.send_signal(signal.SIGTERM)
        try:
            trial.communicate(timeout=_END_S)
        except subprocess.TimeoutExpired:
            os.killpg(trial.pid, signal.SIGKILL)
            trial.communicate()
        return MpiTrial(processes, None, f"no end within {within_s:g} s")
    sizes = re.findall(r"size (\d+)", out)
    if trial.returncode or not sizes:
        return MpiTrial(processes, None, _first_sentence(said or out) or f"ended with {trial.returncode}")
    return MpiTrial(processes, int(sizes[0]))


def _first_sentence(text: str) -> str:
    """Return the first sentence of what mpirun prints between its rulers."""
    lines = [line.strip() for line in text.splitlines() if line.strip(" -\t")]
    return " ".join(lines).partition(". ")[0][:160]

"""Checks of what comes first: names, ssh or srun, and python on every host."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from ipaddress import ip_address

from deca_ds.tools.doctor.facts import Facts, HostFacts
from deca_ds.tools.doctor.findings import Verdict, check, fail, ok, warn

# What ssh says -> what to do. {host} is the host, {look} what _look_first says.
_SSH_FAULTS = (
    (
        r"REMOTE HOST IDENTIFICATION HAS CHANGED",
        "the host key is another one than before",
        "if the host was set up anew: ssh-keygen -R {host}, then ssh {host} and accept its key",
    ),
    (
        r"Host key verification failed|host key is known",
        "ssh does not know the host key",
        "run ssh {host} once and accept its key, or put it into known_hosts",
    ),
    (
        r"Permission denied|Too many authentication failures",
        "ssh asks for a password or passphrase",
        "ssh-copy-id {host}, and ssh-add for a key with a passphrase",
    ),
    (
        r"Could not resolve hostname",
        "ssh cannot resolve the name",
        "{look}add the host to /etc/hosts or to ssh's configuration",
    ),
    (
        r"Connection refused",
        "nothing listens on the ssh port",
        "start sshd on {host}, or set Port in ~/.ssh/config",
    ),
    (
        r"Connection timed out|No route to host|Network is unreachable|Operation timed out",
        "no connection",
        "look whether {host} is up, and at the firewall on the way",
    ),
)
_NO_PYTHON = re.compile(r"python3?: (command )?not found|exec: python3")


def _look_first(scheduler: str | None) -> str:
    """Begin a fix for a name that stands for nothing: only a hostfile is written by hand."""
    return "look for a typing error in the hostfile, or " if scheduler is None else ""


def ssh_fault(host: str, facts: HostFacts, scheduler: str | None) -> tuple[str, str]:
    """Say why a host does not answer, and what to do about it."""
    for pattern, what, fix in _SSH_FAULTS:
        if re.search(pattern, facts.said):
            return what, fix.format(host=host, look=_look_first(scheduler))
    last = (facts.said.splitlines() or [""])[-1][:120]
    fix = f"try: ssh -o BatchMode=yes {host} {sys.executable} -V"
    return f"{facts.fault}" + (f": {last}" if last else ""), fix


@check("hosts")
def hosts(facts: Facts) -> Iterator[Verdict]:
    """Whether nothing tells the hosts of the job that this machine is in."""
    if facts.unlisted is not None:
        fix = (
            "have the others looked at, too: deca doctor --hostfile HOSTS, a file with a line HOST slots=RANKS for each"
        )
        for host in facts.hosts:
            yield warn(host, f"only this machine was looked at, not the other hosts of {facts.unlisted}", fix)


@check("name")
def name(facts: Facts) -> Iterator[Verdict]:
    """Every host's name, here and on all others."""
    for host, of in facts.hosts.items():
        if of.addresses is None:
            continue
        if not of.addresses:
            fix = f"{_look_first(facts.scheduler)}add the host to /etc/hosts"
            if of.sight is not None:
                knows = "Slurm" if facts.by_srun else "ssh's configuration"
                yield warn(host, f"only {knows} knows {host}: no name server and no /etc/hosts", fix)
            else:
                yield fail(host, f"{host} stands for no address", fix)
            continue
        strangers = [other for other, sight in facts.seen.items() if not sight["names"].get(host)]
        if strangers:
            fix = f"add {host} to the name server, or to /etc/hosts there"
            yield warn(host, f"{', '.join(strangers)} cannot resolve {host}, which mpirun and MASTER_ADDR need", fix)
        else:
            yield ok(host, of.addresses[0])


@check("own name")
def own_name(facts: Facts) -> Iterator[Verdict]:
    """Gloo listens at the address of the host's own name, unless told an interface; Open MPI tells hosts by it."""
    for host, sight in facts.seen.items() if len(facts.hosts) > 1 else ():
        own, found = sight["hostname"], sight["names"].get(sight["hostname"], [])
        told = "GLOO_SOCKET_IFNAME" in sight["variables"] or "GLOO_SOCKET_IFNAME" in passed_on(facts)
        mistaken = not found or ip_address(found[0].partition("%")[0]).is_loopback
        if mistaken and not told:
            stands = f"stands for {found[0]}" if found else "stands for no address"
            yield fail(
                host,
                f"its own name {own} {stands} there, so that gloo listens where no other host can reach it",
                f"give {own} the address of its network in /etc/hosts there, or GLOO_SOCKET_IFNAME to all ranks",
            )
        elif twins := [other for other, of in facts.seen.items() if of["hostname"] == own and other != host]:
            what = f"has the host name {own}, and so has {', '.join(twins)}: Open MPI takes them for one host"
            yield warn(host, what, "give each a name of its own: hostnamectl set-hostname NAME")
        else:
            yield ok(host, own)


def passed_on(facts: Facts) -> dict[str, str]:
    """Variables that all ranks get: those of .deepspeed_env, or in a scheduler's job this process's own."""
    if facts.scheduler is not None:
        return dict(facts.here["variables"])
    pairs = (line.partition("=") for file in facts.environment_files for line in file.lines if "=" in line)
    return {key.strip(): value.strip().strip("\"'") for key, _, value in pairs}


@check("ssh")
def ssh(facts: Facts) -> Iterator[Verdict]:
    for host, of in facts.hosts.items() if not facts.by_srun else ():
        if of.sight is not None:
            if facts.remote:
                yield ok(host, "without password")
        elif _NO_PYTHON.search(of.said):
            yield ok(host, "without password")
        elif facts.scheduler is not None:
            what, fix = ssh_fault(host, of, facts.scheduler)
            fix += f"; or run on {host}: deca doctor --hostfile FILE, with a file that names this host alone"
            yield warn(host, f"{what}; a job of {facts.scheduler} needs no ssh, but the doctor does", fix)
        else:
            yield fail(host, *ssh_fault(host, of, None))


@check("srun")
def srun(facts: Facts) -> Iterator[Verdict]:
    """Whether it starts a task on each host of a job of Slurm, which then needs no ssh."""
    for host, of in facts.hosts.items() if facts.by_srun else ():
        if of.sight is not None or _NO_PYTHON.search(of.said):
            if facts.remote:
                yield ok(host, "starts a task there")
            continue
        last = (of.said.splitlines() or [""])[-1][:120]
        what = f"it starts no python there: {of.fault}" + (f": {last}" if last else "")
        fix = f"try: srun --overlap --nodelist={host} {sys.executable} -V; with --hostfile the doctor takes ssh"
        yield fail(host, what, fix)


@check("python")
def python(facts: Facts) -> Iterator[Verdict]:
    """Check for the same interpreter, at the same path."""
    own = facts.here
    for host, of in facts.hosts.items():
        if of.sight is None:
            if _NO_PYTHON.search(of.said):
                yield fail(host, f"there is no {own['python']}, nor any python3", f"install Python {own['version']}")
        elif of.sight["python"] != own["python"]:
            yield fail(
                host,
                f"there is no {own['python']} (python3 is {of.sight['version']})",
                "make the same virtual environment at the same path on every host",
            )
        elif of.sight["version"] != own["version"]:
            tolerated = facts.needs is not None and facts.needs.mixed_versions
            yield (warn if tolerated else fail)(
                host,
                f"Python {of.sight['version']}, here {own['version']}",
                "make all virtual environments with the same Python",
            )
        elif not of.sight["folder"]:
            yield warn(
                host,
                "the working folder of here is not there, so that relative paths and launchers/ are not found",
                "launch from a folder that every host has",
            )
        else:
            yield ok(host, own["version"])

"""Checks of what is between the hosts: interfaces, ports, connections, clocks."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from statistics import median

from deca_ds.tools.doctor.facts import INTERFACE_VARIABLES, Facts
from deca_ds.tools.doctor.findings import HERE, Verdict, check, fail, ok, warn
from deca_ds.tools.doctor.reach import passed_on
from deca_ds.tools.doctor.sights import Interface

_BRIDGES = ("lo", "docker", "virbr", "veth", "br-", "cni", "flannel", "tailscale")  # not between hosts
_SKEW_S, _WRONG_S = 2.0, 300.0  # heartbeats show ages of seconds; certificates fail at minutes
_SLOW, _FEW = 0.1, 3  # of the median of all connections, where there are so many
_LATE_S = 0.05
_HOSTS_DIFFER = "where hosts have other names, set it in each host's ~/.bashrc, above its test for a terminal"


def chosen(value: str, variable: str, interfaces: list[Interface]) -> list[str]:
    """Return the interfaces that a variable picks, as its library reads it. NCCL takes prefixes, "=" before whole names
    and "^" before excluded ones; Open MPI takes names and networks; gloo takes names."""
    names = [interface["name"] for interface in interfaces]
    words = [word.strip() for word in value.lstrip("^=").split(",") if word.strip()]
    if variable == "NCCL_SOCKET_IFNAME":
        whole = value.startswith(("=", "^="))
        found = [name for name in names if any(name == w if whole else name.startswith(w) for w in words)]
        return [name for name in names if name not in found] if value.startswith("^") else found
    if variable == "GLOO_SOCKET_IFNAME":
        return [name for name in names if name in words] if set(words) <= set(names) else []
    return [each["name"] for each in interfaces if each["name"] in words or any(_within(each, word) for word in words)]


def _within(interface: Interface, network: str) -> bool:
    if "/" not in network:
        return False
    try:
        of = ip_network(network, strict=False)
    except ValueError:
        return False
    return any(ip_address(address.partition("/")[0]) in of for address in interface["addresses"])


@check("interfaces")
def interfaces(facts: Facts) -> Iterator[Verdict]:
    """Check whether the variables that name interfaces name some of each host, and hosts that need one."""
    if len(facts.hosts) < 2:
        return
    everywhere = passed_on(facts)
    for host, sight in facts.seen.items():
        told = {name: everywhere.get(name, sight["variables"].get(name, "")) for name in INTERFACE_VARIABLES}
        # mpirun hands on its own variables, the deepspeed launcher NCCL's
        told |= {name: facts.here["variables"].get(name, told[name]) for name in INTERFACE_VARIABLES[1:]}
        told = {name: value for name, value in told.items() if value}
        between = [each for each in sight["interfaces"] if not each["name"].startswith(_BRIDGES)]
        shown = ", ".join(f"{each['name']} {each['addresses'][0]}" for each in between)
        nothing = {name: v for name, v in told.items() if not chosen(v, name, sight["interfaces"])}
        if nothing:
            wrong = ", ".join(f"{name}={value}" for name, value in nothing.items())
            fix = f"name one that every host has in {_place(facts)}; {_HOSTS_DIFFER}"
            yield fail(host, f"{wrong} names no interface there ({shown})", fix)
        elif len(between) > 1 and "GLOO_SOCKET_IFNAME" not in told:
            one = _towards(facts, host, between)
            yield warn(
                host,
                f"several networks ({shown}), and gloo takes that of the host's own name",
                f"write GLOO_SOCKET_IFNAME={one}, and the same for NCCL_SOCKET_IFNAME, into {_place(facts)}",
            )
        else:
            yield ok(host, shown)


def _place(facts: Facts) -> str:
    """Say where variables are set for all ranks."""
    return ".deepspeed_env" if facts.scheduler is None else "the job's script, with export"


def _towards(facts: Facts, host: str, between: list[Interface]) -> str:
    """Return the interface with the address by which the others know the host."""
    known = facts.hosts[host].addresses or []
    named = [e["name"] for e in between if any(a.partition("/")[0] in known for a in e["addresses"])]
    return named[0] if named else between[0]["name"]


@check("variables")
def variables(facts: Facts) -> Iterator[Verdict]:
    """GLOO_SOCKET_IFNAME of this shell does not reach other hosts through the deepspeed launcher."""
    here = facts.here["variables"].get("GLOO_SOCKET_IFNAME")
    if facts.remote and here and "GLOO_SOCKET_IFNAME" not in passed_on(facts):
        unset = [host for host, sight in facts.seen.items() if "GLOO_SOCKET_IFNAME" not in sight["variables"]]
        if unset:
            what = f"GLOO_SOCKET_IFNAME={here} is set here, but deepspeed does not pass it on to {', '.join(unset)}"
            yield warn(HERE, what, f"write GLOO_SOCKET_IFNAME={here} into .deepspeed_env")


@check("port")
def port(facts: Facts) -> Iterator[Verdict]:
    """Check the port of the job's store, on the first host."""
    first = next(iter(facts.hosts))
    if first in facts.seen:
        taken = facts.seen[first]["port"]
        if taken:
            fix = "choose another: deepspeed --master_port N, or MASTER_PORT; another job may still run"
            yield fail(first, f"port {facts.port} of the job's store: {taken}", fix)
        else:
            yield ok(first, f"{facts.port} is free")


@check("links")
def links(facts: Facts) -> Iterator[Verdict]:
    """Connections between hosts that send each other messages."""
    speeds = [link["bytes_per_s"] for link in facts.links.values() if "bytes_per_s" in link]
    usual = median(speeds) if len(speeds) >= _FEW else 0.0
    for (one, other), link in facts.links.items():
        both = f"{one} to {other}"
        if "error" in link:
            fix = f"open all ports between {one} and {other}: gloo, NCCL and MPI choose theirs"
            for host in (one, other):
                yield fail(host, f"{both}: {link['error']}", fix)
            continue
        what = f"{both}: {1e3 * link['round_trip_s']:.2f} ms, {link['bytes_per_s'] / 1e6:,.0f} MB/s"
        if link["bytes_per_s"] < _SLOW * usual:
            for host in (one, other):
                yield warn(host, f"{what}, the others {usual / 1e6:,.0f} MB/s", "look at cable, switch and interface")
        elif link["round_trip_s"] > _LATE_S:
            for host in (one, other):
                yield warn(host, what, "raise gossip.every, so that fewer averagings wait")
        else:
            for host in (one, other):
                yield ok(host, what)


@check("clock")
def clock(facts: Facts) -> Iterator[Verdict]:
    """Against this machine's."""
    for host, of in facts.hosts.items():
        if of.clock is None or not facts.remote:
            continue
        ahead, error = of.clock.ahead_s, of.clock.error_s
        off = abs(ahead) - error
        if off > _SKEW_S:
            what = f"{abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} this machine's clock"
            fix = "switch on time synchronisation (chrony, systemd-timesyncd) there and here"
            yield (fail if off > _WRONG_S else warn)(host, what, fix)
        else:
            yield ok(host, f"{ahead:+.2f} s, give or take {error:.2f}")

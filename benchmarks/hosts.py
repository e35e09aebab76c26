"""Hosts of a cluster as network namespaces of this machine, whose links can be cut. Needs root on Linux."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ADDRESS = "10.77.0.{}"
DEVICE = "lan"
# ssh for Open MPI; it wants hosts to have different names
AGENT = 'ip netns exec {prefix}h$((${{host##*.}} - 1)) unshare --uts sh -c "hostname host${{host##*.}}; $*"'


def ip(*command: str) -> None:
    """Run `ip`. Raises subprocess.SubprocessError or OSError."""
    subprocess.run(["ip", *command], check=True, capture_output=True, timeout=100)


def may_make_hosts() -> bool:
    """Whether this process may make network namespaces."""
    if os.geteuid() != 0:
        return False
    name = f"deca{os.getpid()}probe"
    try:
        ip("netns", "add", name)
        ip("netns", "del", name)
    except (OSError, subprocess.SubprocessError):
        return False
    return True


class Hosts:
    """n network namespaces on one bridge, or some of them on another one, both in a namespace of their own; host i has
    the address 10.77.0.(i+1)."""

    def __init__(self, n: int, ranks: int = 1):
        self.ranks = ranks  # of each host
        self.prefix = f"deca{os.getpid()}"
        self.names = [f"{self.prefix}h{i}" for i in range(n)]
        self.switch = f"{self.prefix}s"

    def set_up(self) -> None:
        """Make them, with their links up. A process of the same number may have left some when it was killed."""
        self.clean_up()
        for name in (self.switch, *self.names):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        for bridge in ("bridge", "apart"):
            ip("-n", self.switch, "link", "add", bridge, "type", "bridge")
            ip("-n", self.switch, "link", "set", bridge, "up")
        for i, name in enumerate(self.names):
            ip("-n", name, "link", "add", DEVICE, "type", "veth", "peer", "name", f"port{i}", "netns", self.switch)
            ip("-n", name, "addr", "add", f"{ADDRESS.format(i + 1)}/24", "dev", DEVICE)
            ip("-n", name, "link", "set", DEVICE, "up")
            ip("-n", self.switch, "link", "set", f"port{i}", "master", "bridge")
            ip("-n", self.switch, "link", "set", f"port{i}", "up")

    def set_apart(self, i: int, apart: bool) -> None:
        """Whether host i reaches only those that are set apart, too, or only those that are not."""
        ip("-n", self.switch, "link", "set", f"port{i}", "master", "apart" if apart else "bridge")

    def part(self, i: int, j: int, parted: bool) -> None:
        """Whether what hosts i and j send each other is lost, though both reach the others."""
        for here, there in ((i, j), (j, i)):
            neighbour = ADDRESS.format(there + 1), "dev", DEVICE
            nowhere = ("lladdr", "02:00:00:00:00:01", "nud", "permanent") if parted else ()
            ip("-n", self.names[here], "neigh", "replace" if parted else "del", *neighbour, *nowhere)

    def link(self, i: int, state: str) -> None:
        """state: up or down."""
        ip("-n", self.switch, "link", "set", f"port{i}", state)

    def limit(self, rate: str) -> None:
        """Let each host send at most at `rate`, which is written as `tc` wants it: 10gbit. Raises as `ip` does."""
        bucket = ("burst", "1mb", "latency", "100ms")
        for name in self.names:
            limit = ["tc", "-n", name, "qdisc", "add", "dev", DEVICE, "root", "tbf", "rate", rate, *bucket]
            subprocess.run(limit, check=True, capture_output=True, timeout=100)

    def mpirun(self, folder: Path, *command: str) -> list[str]:
        """What runs `command` under Open MPI's mpirun, called on host 0, with one rank a host and TCP between them.
        folder: for the list of the hosts and for what stands in for ssh."""
        hosts, agent = folder / "hosts", folder / "agent"
        hosts.write_text("".join(f"{ADDRESS.format(i + 1)} slots=1\n" for i in range(len(self.names))))
        agent.write_text(f"#!/bin/sh\nhost=$1; shift\nexec {AGENT.format(prefix=self.prefix)}\n")
        agent.chmod(0o755)
        settings = {"pml": "ob1", "btl": "tcp,self", "btl_tcp_if_include": DEVICE}
        mpirun = [
            *(str(Path(sys.executable).parent / "mpirun"), "--prtemca", "plm_ssh_agent", str(agent)),
            *("--hostfile", str(hosts), "-n", str(len(self.names)), "--map-by", "node", "--bind-to", "none"),
            *(word for key, value in settings.items() for word in ("--mca", key, value)),
        ]
        named = ("unshare", "--uts", "sh", "-c", 'hostname host1; exec "$@"', "sh")
        return self.command(0, *named, *mpirun, "-x", "OMP_NUM_THREADS", *command)

    def command(self, i: int, *command: str) -> list[str]:
        """What runs `command` on host i."""
        return ["ip", "netns", "exec", self.names[i], *command]

    def environment(self, i: int, local_rank: int = 0) -> dict[str, str]:
        """Of a rank of host i."""
        rank, world_size = i * self.ranks + local_rank, len(self.names) * self.ranks
        return {
            **{key: value for key, value in os.environ.items() if not key.startswith(("OMPI_", "PMIX_", "PRTE_"))},
            **{"RANK": str(rank), "WORLD_SIZE": str(world_size)},
            **{"LOCAL_RANK": str(local_rank), "LOCAL_SIZE": str(self.ranks)},
            **{"MASTER_ADDR": ADDRESS.format(1), "MASTER_PORT": "29511", "GLOO_SOCKET_IFNAME": DEVICE},
            **{"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        }

    def clean_up(self) -> None:
        """Remove them; what runs there has been ended before."""
        for name in (self.switch, *self.names):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=100)

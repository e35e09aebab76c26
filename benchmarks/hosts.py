"""Hosts of a cluster as network namespaces of this machine, whose links can be cut. Needs root on Linux."""

from __future__ import annotations

import os
import subprocess

ADDRESS = "10.77.0.{}"
DEVICE = "lan"


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

"""The launcher's hostfile, read before anything is launched: `HOST slots=N` a line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from deca_ds.config.paths import read_given
from deca_ds.errors import LaunchError
from deca_ds.launch.launcher import ClientLayout

# a host's name is visible ASCII: `deepspeed` reads others in part
_ENTRY = re.compile(r"([!-~]+)\s+slots=(\d{1,6})(\s+max[_-]slots=\d+)?\s*(#.*)?", re.ASCII)


def read_hostfile(path: Path) -> dict[str, int]:
    """Host -> slots, in the file's order, as `deepspeed` and mpirun number ranks by.

    Stricter than `deepspeed`, which trains on one host alone if the file is not there, and takes `slots=4x` for 4.
    Raises LaunchError that names the file and the line.
    """
    lines = read_given(path, "the hostfile", LaunchError).split("\n")
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        where, entry = f"{path}:{number}", _ENTRY.fullmatch(line.strip())
        if entry is None:
            raise LaunchError(f"{line.strip()[:80]!r} is no host", where=where, fix="write: HOST slots=RANKS")
        host, count = entry[1], int(entry[2])
        if host in slots:
            raise LaunchError(f"{host} is there twice", where=where, fix="give every host one line")
        if count == 0:
            raise LaunchError(f"{host} has no slots", where=where, fix="give it some, or leave it out")
        slots[host] = count
    if not slots:
        raise LaunchError("there are no hosts in it", where=str(path), fix="write: HOST slots=RANKS, a host a line")
    return slots


def hosts_of_clients(slots: Mapping[str, int], layout: ClientLayout) -> list[list[str]]:
    """Return, for each client, the hosts of its ranks, in order. slots: of as many ranks as `layout` has."""
    host_of_rank = [host for host, count in slots.items() for _ in range(count)]
    return [list(dict.fromkeys(host_of_rank[rank] for rank in layout.ranks_of(c))) for c in range(layout.clients)]

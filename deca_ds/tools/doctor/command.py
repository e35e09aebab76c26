"""`deca doctor`: its arguments, and from them to the findings and the exit code."""

from __future__ import annotations

import argparse
import json
import os
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from deca_ds.config import Config, load_config
from deca_ds.config.arguments import add_config, chosen
from deca_ds.config.paths import argument as path_argument
from deca_ds.errors import ConfigError, UserError
from deca_ds.launch.allocation import Allocation, find_allocation, unlisted_job
from deca_ds.launch.hostfile import read_hostfile
from deca_ds.tools.doctor import table
from deca_ds.tools.doctor.checks import judge
from deca_ds.tools.doctor.examine import examine
from deca_ds.tools.doctor.facts import DEADLINE_S, STORE_PORT, Needs
from deca_ds.tools.doctor.findings import State

FAILED_CODE = 2
_LONGEST_S = 86400.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hostfile",
        type=path_argument,
        help="look at all its hosts, over ssh (default: those of the job of Slurm, Flux, PBS or LSF that it is started "
        "in, in Slurm's by srun; else this machine)",
    )
    add_config(parser, "also look for what this configuration needs on each host")
    parser.add_argument("--port", help=f"of the job's store (default MASTER_PORT or {STORE_PORT})")
    parser.add_argument(
        "--deadline",
        type=float,
        default=DEADLINE_S,
        metavar="S",
        help=f"give each host S seconds for an answer (default {DEADLINE_S:g})",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the findings; 2 if anything has failed, else 0. Raises UserError for a mistake in the command itself."""
    path, overrides = chosen(arguments)
    if overrides and path is None:
        raise ConfigError(f"{overrides[0]!r} changes no configuration", fix="name its file, RUN.yaml")
    if not 0 < arguments.deadline <= _LONGEST_S:
        raise ConfigError(f"--deadline {arguments.deadline:g} is no time", fix=f"give up to {_LONGEST_S:g} seconds")
    allocation = find_allocation(os.environ) if arguments.hostfile is None else None
    slots = _slots(arguments.hostfile, allocation)
    needs: Needs | None = None
    mistake: UserError | None = None
    if path is not None:
        try:
            config = load_config(path, overrides)
            if arguments.hostfile is None and not (allocation is not None and allocation.told):
                slots = _spread(_ranks(config), list(slots))
            from deca_ds.tools.doctor.needs import needs_of

            needs = needs_of(config, slots, path)
        except UserError as error:
            mistake = error
    port = _port(arguments.port or os.environ.get("MASTER_PORT", str(STORE_PORT)))
    scheduler = None if allocation is None else allocation.scheduler
    facts = examine(slots, arguments.deadline, needs, mistake, port=port, scheduler=scheduler)
    if arguments.hostfile is None:
        facts = replace(facts, unlisted=unlisted_job(os.environ))
    findings = judge(facts)
    if arguments.json:
        print(json.dumps(table.as_dict(facts, findings), indent=1))
    else:
        table.show(Console(), facts, findings)
    return FAILED_CODE if table.worst(findings) == State.FAIL else 0


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 2**16:
        raise ConfigError(f"{text!r} is no port", where="--port or MASTER_PORT", fix="give a number from 1 to 65535")
    return int(text)


def _slots(hostfile: Path | None, allocation: Allocation | None) -> dict[str, int]:
    """Return the hosts with their ranks, as far as these are known without a configuration."""
    if hostfile is not None:
        return read_hostfile(hostfile)
    return {socket.gethostname(): 1} if allocation is None else dict(allocation.tasks)


def _spread(ranks: int, hosts: Sequence[str]) -> dict[str, int]:
    """Give each host as many of the ranks as the others, up to one."""
    each, more = divmod(ranks, len(hosts))
    return {host: each + (place < more) for place, host in enumerate(hosts)}


def _ranks(config: Config) -> int:
    """Return the number of ranks of the job where no launcher has told it: one a client, unless the configuration
    says."""
    return sum(config.cluster.ranks) if config.cluster.ranks is not None else config.cluster.clients

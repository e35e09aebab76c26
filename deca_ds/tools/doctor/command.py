"""`deca doctor`: its arguments, and from them to the findings and the exit code."""

from __future__ import annotations

import argparse
import os
import socket

from rich.console import Console

from deca_ds.config import Config, load_config
from deca_ds.config.arguments import add_config, chosen
from deca_ds.config.paths import argument as path_argument
from deca_ds.errors import ConfigError, UserError
from deca_ds.launch.hostfile import read_hostfile
from deca_ds.tools.doctor import table
from deca_ds.tools.doctor.checks import judge
from deca_ds.tools.doctor.examine import examine
from deca_ds.tools.doctor.facts import STORE_PORT, Needs
from deca_ds.tools.doctor.findings import State

FAILED_CODE = 2
_LONGEST_S = 86400.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hostfile", type=path_argument, help="look at all its hosts, over ssh (default: this machine)"
    )
    add_config(parser, "also look for what this configuration needs on each host")
    parser.add_argument("--port", help=f"of the job's store (default MASTER_PORT or {STORE_PORT})")
    parser.add_argument(
        "--deadline", type=float, default=60.0, metavar="S", help="give each host S seconds for an answer (default 60)"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the findings; 2 if anything has failed, else 0. Raises UserError for a mistake in the command itself."""
    path, overrides = chosen(arguments)
    if overrides and path is None:
        raise ConfigError(f"{overrides[0]!r} changes no configuration", fix="name its file, RUN.yaml")
    if not 0 < arguments.deadline <= _LONGEST_S:
        raise ConfigError(f"--deadline {arguments.deadline:g} is no time", fix=f"give up to {_LONGEST_S:g} seconds")
    slots = read_hostfile(arguments.hostfile) if arguments.hostfile is not None else {socket.gethostname(): 1}
    needs: Needs | None = None
    mistake: UserError | None = None
    if path is not None:
        try:
            config = load_config(path, overrides)
            if arguments.hostfile is None:
                slots = {name: _ranks(config) for name in slots}
            from deca_ds.tools.doctor.needs import needs_of

            needs = needs_of(config, slots, path)
        except UserError as error:
            mistake = error
    port = _port(arguments.port or os.environ.get("MASTER_PORT", str(STORE_PORT)))
    facts = examine(slots, arguments.hostfile is not None, port, arguments.deadline, needs, mistake)
    findings = judge(facts)
    if arguments.json:
        print(table.as_json(facts, findings))
    else:
        table.show(Console(), facts, findings)
    return FAILED_CODE if table.worst(findings) == State.FAIL else 0


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 2**16:
        raise ConfigError(f"{text!r} is no port", where="--port or MASTER_PORT", fix="give a number from 1 to 65535")
    return int(text)


def _ranks(config: Config) -> int:
    """Return the number of ranks on a single machine: one a client, unless the configuration says."""
    return sum(config.cluster.ranks) if config.cluster.ranks is not None else config.cluster.clients

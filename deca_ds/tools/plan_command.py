"""The command `deca plan`; a dry run of the trainer prints the same plan."""

from __future__ import annotations

import argparse

from deca_ds.config.arguments import add_config, chosen
from deca_ds.config.paths import argument as path_argument
from deca_ds.errors import USER_ERROR_CODE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add those that `run` reads."""
    add_config(parser)
    parser.add_argument(
        "--hostfile",
        type=path_argument,
        help="the hostfile of deepspeed or mpirun: show which client gets which hosts, and look at each of them",
    )
    parser.add_argument(
        "--no-ssh", action="store_true", help="with --hostfile: do not look at the hosts, which may not be there yet"
    )
    parser.add_argument(
        "--gpu", metavar="NAME", help="whether it fits, and the time of a step: H100, A100, RTX4090, ..."
    )
    parser.add_argument("--net", metavar="RATE", help="with --gpu: of the network between hosts, in bits a second: 10G")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; returns the exit status, 2 if a host of the hostfile lacks anything. Raises the UserErrors that
    the run itself would."""
    from deca_ds.config import load_config

    path, overrides = chosen(arguments)
    config = load_config(path, overrides)  # a mistake there is told at once, before the imports below

    from deca_ds.tools.plan import print_plan

    fits = print_plan(
        config,
        hostfile=arguments.hostfile,
        gpu=arguments.gpu,
        net=arguments.net,
        as_json=arguments.json,
        look=not arguments.no_ssh,
        file=path,
    )
    return 0 if fits else USER_ERROR_CODE

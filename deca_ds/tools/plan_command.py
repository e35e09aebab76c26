"""The command `deca plan`; a dry run of the trainer prints the same plan."""

from __future__ import annotations

import argparse

from deca_ds.config.arguments import add_config, chosen
from deca_ds.config.paths import argument as path_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those that `run` reads."""
    add_config(parser)
    parser.add_argument(
        "--hostfile", type=path_argument, help="the hostfile of deepspeed or mpirun: show which client gets which hosts"
    )
    parser.add_argument(
        "--gpu", metavar="NAME", help="whether it fits, and the time of a step: H100, A100, RTX4090, ..."
    )
    parser.add_argument("--net", metavar="RATE", help="with --gpu: of the network between hosts, in bits a second: 10G")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; returns the exit status 0. Raises the UserErrors that the run itself would."""
    from deca_ds.config import load_config
    from deca_ds.tools.plan import print_plan

    config = load_config(*chosen(arguments))
    print_plan(config, hostfile=arguments.hostfile, gpu=arguments.gpu, net=arguments.net, as_json=arguments.json)
    return 0

"""The `deca` command: what needs no cluster."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence

from deca_ds import __version__
from deca_ds.config.paths import argument as path_argument
from deca_ds.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """All commands but training; returns the exit code."""
    from deca_ds.checkpoint.commands import add_export_arguments, run_export
    from deca_ds.simulation import command as simulation
    from deca_ds.tools import status, supervise
    from deca_ds.tools.doctor import command as doctor
    from deca_ds.training.terminal import own_streams

    own_streams()
    parser = argparse.ArgumentParser(prog="deca", description="Tools for DECA runs. Train with launchers/train.py.")
    parser.add_argument("--version", action="version", version=f"deca_ds {__version__}")
    commands = parser.add_subparsers(required=True)
    export = commands.add_parser("export", help="make a Hugging Face model of a finished run")
    add_export_arguments(export)
    export.set_defaults(command=run_export)
    plan = commands.add_parser("plan", help="check a configuration and show blocks, graph, data and steps")
    plan.add_argument("--config", type=path_argument, required=True, help="YAML file with the run's configuration")
    plan.add_argument(
        "--hostfile", type=path_argument, help="the hostfile of deepspeed or mpirun: show which client gets which hosts"
    )
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys that replace the file's")
    plan.set_defaults(command=_plan)
    examine = commands.add_parser("doctor", help="look at every host, before a job is started on them")
    doctor.add_arguments(examine)
    examine.set_defaults(command=doctor.run)
    simulate = commands.add_parser("simulate", help="train all clients of a configuration in this one process")
    simulation.add_arguments(simulate)
    simulate.set_defaults(command=simulation.run)
    show = commands.add_parser("status", help="show what every rank of a run is doing")
    status.add_arguments(show)
    show.set_defaults(command=status.run)
    keep = commands.add_parser("supervise", help="start a job again when it ends before its run does")
    supervise.add_arguments(keep)
    keep.set_defaults(command=supervise.run)
    arguments = parser.parse_args(argv)
    try:
        command: Callable[[argparse.Namespace], int] = arguments.command
        return command(arguments)
    except UserError as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nERROR: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def _plan(arguments: argparse.Namespace) -> int:
    from deca_ds.config import load_config
    from deca_ds.tools.plan import print_plan

    print_plan(load_config(arguments.config, arguments.overrides), hostfile=arguments.hostfile)
    return 0


if __name__ == "__main__":
    sys.exit(main())

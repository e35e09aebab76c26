"""The `deca` command: what needs no cluster."""

from __future__ import annotations

import argparse
import difflib
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TypeAlias

from deca_ds import __version__
from deca_ds.config.arguments import add_config, chosen
from deca_ds.config.paths import argument as path_argument
from deca_ds.errors import ConfigError, UserError

Run: TypeAlias = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """`deca COMMAND ...`; returns the exit code. Of the commands' modules only the named one's are imported."""
    from deca_ds.training.terminal import own_streams

    own_streams()
    given = sys.argv[1:] if argv is None else list(argv)
    if given[:1] == ["train"]:  # which takes its launcher's arguments, too
        from deca_ds.launchers.train import main as train

        return train(given[1:], "deca train")
    if not given or given[0] not in _COMMANDS:
        return _without_command(given)
    about, prepare = _COMMANDS[given[0]]
    parser = argparse.ArgumentParser(prog=f"deca {given[0]}", description=f"{about[0].upper()}{about[1:]}.")
    run = prepare(parser)
    # in any order, save where all that follows is another program's command
    is_wrapper = any(action.nargs == argparse.REMAINDER for action in parser._actions)
    arguments = parser.parse_args(given[1:]) if is_wrapper else parser.parse_intermixed_args(given[1:])
    try:
        return run(arguments)
    except UserError as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nERROR: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def _without_command(given: Sequence[str]) -> int:
    """Help, the version, or what is wrong."""
    if not given:
        _overview().print_help(sys.stderr)
        return 2
    if given[0] in ("-h", "--help", "--version"):
        _overview().parse_args(given[:1])  # which exits
    close = difflib.get_close_matches(given[0], ["train", *_COMMANDS], n=1)
    fix = f"did you mean deca {close[0]}?" if close else "deca --help lists the commands"
    print(f"ERROR: {ConfigError(f'deca has no command {given[0]!r}', fix=fix)}", file=sys.stderr)
    return 2


def _overview() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="deca", description="Train with DECA, and tools for its runs.")
    parser.add_argument("--version", action="version", version=f"deca_ds {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    commands.add_parser("train", help="train; started on every rank by a launcher, or by itself as one client")
    for name, (about, _) in _COMMANDS.items():
        commands.add_parser(name, help=about)
    return parser


def _cache(parser: argparse.ArgumentParser) -> Run:
    from deca_ds.tools import cache

    cache.add_arguments(parser)
    return cache.run


def _chat(parser: argparse.ArgumentParser) -> Run:
    from deca_ds.tools.chat import command

    command.add_arguments(parser)
    return command.run


def _data(parser: argparse.ArgumentParser) -> Run:
    from deca_ds.tools.data import command

    command.add_arguments(parser)
    return command.run


def _doctor(parser: argparse.ArgumentParser) -> Run:
    from deca_ds.tools.doctor import command

    command.add_arguments(parser)
    return command.run


def _export(parser: argparse.ArgumentParser) -> Run:
    from deca_ds.tools.export import add_export_arguments, run_export

    add_export_arguments(parser)
    return run_export


def _plan(parser: argparse.ArgumentParser) -> Run:
    add_config(parser)
    parser.add_argument(
        "--hostfile", type=path_argument, help="the hostfile of deepspeed or mpirun: show which client gets which hosts"
    )
    parser.add_argument(
        "--gpu", metavar="NAME", help="whether it fits, and the time of a step: H100, A100, RTX4090, ..."
    )
    parser.add_argument("--net", metavar="RATE", help="with --gpu: of the network between hosts, in bits a second: 10G")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    return _print_plan


def _print_plan(arguments: argparse.Namespace) -> int:
    from deca_ds.config import load_config
    from deca_ds.tools.plan import print_plan

    config = load_config(*chosen(arguments))
    told = {"gpu": arguments.gpu, "net": arguments.net, "as_json": arguments.json}
    print_plan(config, hostfile=arguments.hostfile, **told)
    return 0


def _report(parser: argparse.ArgumentParser) -> Run:
    from deca_ds.tools.report import command

    command.add_arguments(parser)
    return command.run


def _simulate(parser: argparse.ArgumentParser) -> Run:
    from deca_ds.simulation import command

    command.add_arguments(parser)
    return command.run


def _status(parser: argparse.ArgumentParser) -> Run:
    from deca_ds.tools import status

    status.add_arguments(parser)
    return status.run


def _stop(parser: argparse.ArgumentParser) -> Run:
    from deca_ds.tools import stop

    stop.add_arguments(parser)
    return stop.run


def _supervise(parser: argparse.ArgumentParser) -> Run:
    from deca_ds.tools import supervise

    supervise.add_arguments(parser)
    return supervise.run


def _where(parser: argparse.ArgumentParser) -> Run:
    return _print_where


def _print_where(_: argparse.Namespace) -> int:
    import deca_ds.launchers

    print(*deca_ds.launchers.__path__)
    return 0


# name: what it does, and what gives its parser the arguments
_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], Run]]] = {
    "cache": ("show how much room prepared data take, and remove old ones", _cache),
    "chat": ("ask one or several models, and read their answers side by side", _chat),
    "data": ("show what each client trains on: examples, lengths, labels, repeats", _data),
    "doctor": ("look at every host, before a job is started on them", _doctor),
    "export": ("make a Hugging Face model of a run, or of a checkpoint", _export),
    "plan": ("check a configuration and show blocks, graph, data, steps, memory and time", _plan),
    "report": ("make one HTML file of what one or several runs did", _report),
    "simulate": ("train all clients of a configuration in this one process", _simulate),
    "status": ("show what every rank of a run is doing", _status),
    "stop": ("have a job save a checkpoint and stop, from any host that sees its folder", _stop),
    "supervise": ("start a job again when it ends before its run does", _supervise),
    "where": ("print the folder of train.py, for launchers that start a file", _where),
}


if __name__ == "__main__":
    sys.exit(main())

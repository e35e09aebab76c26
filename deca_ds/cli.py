"""The `deca` command: its subcommands, and which module each is in."""

from __future__ import annotations

import argparse
import atexit
import difflib
import gc
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from deca_ds import __version__
from deca_ds.errors import ConfigError, UserError
from deca_ds.printing import print_wrapped


def main(argv: Sequence[str] | None = None) -> int:
    """Run `deca COMMAND ...`, and import the module of that command alone. Returns the exit code."""
    from deca_ds.training.terminal import own_streams

    own_streams()
    atexit.register(gc.freeze)  # or the interpreter would look for garbage in all that was imported: a second or more
    given = sys.argv[1:] if argv is None else list(argv)
    if given[:1] == ["train"]:  # reads its launcher's arguments itself
        from deca_ds.launchers.train import main as train

        return train(given[1:], "deca train")
    if not given or given[0] not in COMMANDS:
        return _without_command(given)
    arguments = parse(given)
    try:
        return int(import_module(f"deca_ds.{COMMANDS[given[0]][1]}").run(arguments))
    except UserError as error:
        print_wrapped(f"ERROR: {error}")
        return 2
    except KeyboardInterrupt:
        print_wrapped("\nERROR: interrupted")
        return 128 + signal.SIGINT


def parse(given: Sequence[str]) -> argparse.Namespace:
    """Return what follows `deca` on the command line, as its command takes it; given[0] is one of `COMMANDS`."""
    about, module = COMMANDS[given[0]]
    parser = argparse.ArgumentParser(prog=f"deca {given[0]}", description=f"{about[0].upper()}{about[1:]}.")
    import_module(f"deca_ds.{module}").add_arguments(parser)
    # options and arguments in any order, unless the rest of the line is another program's command
    is_wrapper = any(action.nargs == argparse.REMAINDER for action in parser._actions)
    return parser.parse_args(given[1:]) if is_wrapper else parser.parse_intermixed_args(given[1:])


def _without_command(given: Sequence[str]) -> int:
    """Print the help, the version, or what is wrong with the command; returns the exit code."""
    if not given:
        _overview().print_help(sys.stderr)
        return 2
    if given[0] in ("-h", "--help", "--version"):
        _overview().parse_args(given[:1])  # which exits
    close = difflib.get_close_matches(given[0], ["train", *COMMANDS], n=1)
    fix = f"did you mean deca {close[0]}?" if close else "deca --help lists the commands"
    print_wrapped(f"ERROR: {ConfigError(f'deca has no command {given[0]!r}', fix=fix)}")
    return 2


def _overview() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="deca", description="Train with DECA, and tools for its runs.")
    parser.add_argument("--version", action="version", version=f"deca_ds {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    commands.add_parser("train", help="train; started on every rank by a launcher, or by itself as one client")
    for name, (about, _) in COMMANDS.items():
        commands.add_parser(name, help=about)
    return parser


# name: what it does, and the module with its `add_arguments` and `run`
COMMANDS: dict[str, tuple[str, str]] = {
    "cache": ("show how much room prepared data take, and remove old ones", "tools.cache"),
    "chat": ("ask one or several models, and read their answers side by side", "tools.chat.command"),
    "data": ("show what each client trains on: examples, lengths, labels, repeats", "tools.data.command"),
    "doctor": ("look at every host, before a job is started on them", "tools.doctor.command"),
    "export": ("make a Hugging Face model of a run, or of a checkpoint", "tools.export"),
    "plan": ("check a configuration and show blocks, graph, data, steps, memory and time", "tools.plan_command"),
    "report": ("make one HTML file of what one or several runs did", "tools.report.command"),
    "simulate": ("train all clients of a configuration in this one process", "simulation.command"),
    "status": ("show what every rank of a run is doing", "tools.status"),
    "stop": ("have a job save a checkpoint and stop, from any host that sees its folder", "tools.stop"),
    "supervise": ("start a job again when it ends before its run does", "tools.supervise"),
    "where": ("print the folder of train.py, for launchers that start a file", "launchers.where"),
}


if __name__ == "__main__":
    sys.exit(main())

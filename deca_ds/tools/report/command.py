"""`deca report RUN [RUN ...]`: read the runs, make the page, write it."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from deca_ds.config.paths import argument as path_argument
from deca_ds.errors import ConfigError, in_words
from deca_ds.printing import print_wrapped

_BEGINNING = 2000  # characters of a file in which a report shows what it is


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `deca report`."""
    parser.add_argument("runs", type=path_argument, nargs="+", metavar="RUN", help="a run's output folder")
    parser.add_argument(
        "-o", "--output", type=path_argument, default=Path("report.html"), metavar="FILE", help="default: report.html"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the report and say where it is; returns the exit status. Raises UserErrors, before anything is written."""
    from deca_ds.tools.report.page import MARK, render
    from deca_ds.tools.report.reading import read_runs

    check_output(arguments.output, MARK)
    runs = read_runs(arguments.runs)
    page = render(runs)
    write(page, arguments.output)
    for note in (f"{run.name}: {note}" for run in runs for note in run.notes):
        print_wrapped(note, sys.stdout)
    print_wrapped(f"{arguments.output}: {len(page.encode()) / 1e6:.1f} MB, open it in a browser", sys.stdout)
    return 0


def check_output(path: Path, mark: str) -> None:
    """Raise ConfigError for a path that cannot be written, or holds anything but a report."""
    fix = "name another file with -o"
    if path.is_dir():
        raise ConfigError(f"{str(path)!r} is a folder", where="-o", fix=fix)
    if not path.parent.is_dir():
        raise ConfigError(f"there is no folder {str(path.parent)!r}", where="-o", fix=fix)
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            is_report = mark in file.read(_BEGINNING)
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"cannot read {str(path)!r}: {in_words(error)}", where="-o", fix=fix) from error
    if not is_report:
        raise ConfigError(f"{str(path)!r} is there already, and is no report", where="-o", fix=fix)


def write(page: str, path: Path) -> None:
    """Write all of the page or nothing. Raises ConfigError where it cannot be written."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(
            f"cannot write {str(path)!r}: {in_words(error)}", where="-o", fix="name another file with -o"
        ) from error

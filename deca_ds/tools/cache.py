"""`deca cache [FOLDER] [--remove DAYS]`: how much room prepared data take, and their removal."""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from pathlib import Path

from deca_ds.config.paths import argument as path_argument
from deca_ds.errors import ConfigError
from deca_ds.printing import print_wrapped

_DAY_S = 24 * 3600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        type=path_argument,
        nargs="?",
        metavar="FOLDER",
        help="data.cache of a run; default: that of runs without",
    )
    parser.add_argument(
        "--remove", type=float, metavar="DAYS", help="remove what no run or plan has used for so many days"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print a line a kind of entry, and remove the old ones where that is asked for. Raises ConfigError."""
    from rich.filesize import decimal

    from deca_ds.data.cache import folder_of
    from deca_ds.data.kept import Kept, kept

    folder: Path = arguments.folder or folder_of(None)
    if arguments.folder is not None and not folder.is_dir():
        raise ConfigError(f"there is no folder {str(folder)!r}", where="FOLDER", fix="name the data.cache of a run")
    if arguments.remove is not None and not arguments.remove >= 0:
        raise ConfigError(f"--remove {arguments.remove:g} is no number of days", fix="give 0 or more")
    now, entries = time.time(), kept(folder)
    by_kind: dict[str, list[Kept]] = defaultdict(list)
    for entry in entries:
        by_kind[entry.kind].append(entry)
    print_wrapped(f"{folder}: {decimal(sum(entry.bytes for entry in entries))}", sys.stdout)
    for kind, of_kind in sorted(by_kind.items()):
        ages = [max(0.0, now - entry.used) / _DAY_S for entry in (of_kind[-1], of_kind[0])]
        number = f"{len(of_kind)} entr{'ies' if len(of_kind) > 1 else 'y'}"
        size = decimal(sum(entry.bytes for entry in of_kind))
        print_wrapped(f"  {kind}: {number}, {size}, last used {ages[0]:.1f} to {ages[1]:.1f} days ago", sys.stdout)
    if arguments.remove is not None:
        old = [entry for entry in entries if now - entry.used >= arguments.remove * _DAY_S]
        for entry in old:
            entry.remove()
        print_wrapped(f"removed {len(old)} of {len(entries)}, {decimal(sum(entry.bytes for entry in old))}", sys.stdout)
    elif entries:
        print_wrapped("to remove what was not used for 30 days: --remove 30", sys.stdout)
    return 0

"""`deca status RUN`: where every rank of a run is, from the heartbeats in its folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from deca_ds.checkpoint.done import ended
from deca_ds.config.paths import argument as path_argument
from deca_ds.config.resume import SAVED_CONFIG
from deca_ds.errors import CheckpointError
from deca_ds.watchdog.heartbeats import FOLDER, SILENCE_S, Heartbeat, read_heartbeats


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=path_argument, help="the run's output folder")


def run(arguments: argparse.Namespace) -> int:
    """Print the table and how the run ended, if it has."""
    console = Console()
    console.print(status_table(arguments.run))
    for name in ended(arguments.run):
        console.print(f"{name}: {(arguments.run / name).read_text(errors='replace').strip()}", markup=False)
    return 0


def status_table(folder: Path) -> Table:
    """A line a rank that writes on this host's disks. Raises CheckpointError for a folder that is no run's."""
    if not (folder / FOLDER).is_dir():
        run_without = (folder / SAVED_CONFIG).is_file()
        raise CheckpointError(
            f"there are no heartbeats in {str(folder)!r}" + ("" if run_without else ", which is no run's folder"),
            where=str(folder / FOLDER),
            fix="name the run.output of a run that has started; without a shared file system, ask on each host",
        )
    has_ended = bool(ended(folder))
    table = Table(title=str(folder))
    for column in ("rank", "host", "client", "phase", "step", "last progress", ""):
        table.add_column(column, justify="left" if column in ("host", "phase", "") else "right")
    for heartbeat in read_heartbeats(folder):
        client = "" if heartbeat.client is None else str(heartbeat.client)
        where = (heartbeat.doing, str(heartbeat.step or ""), f"{heartbeat.age_s():.0f} s ago")
        table.add_row(str(heartbeat.rank), heartbeat.host, client, *where, "" if has_ended else _mark(heartbeat))
    return table


def _mark(heartbeat: Heartbeat) -> str:
    if heartbeat.silent_s() > SILENCE_S:
        return f"stale: no sign of life for {heartbeat.silent_s():.0f} s"
    return ""

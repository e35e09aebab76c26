"""`deca status RUN [--watch]`: where every rank of a run is, from the heartbeats in its folder, and how the run is.

    exit code 0   it is done, or all ranks give signs of life
    exit code 1   it has failed
    exit code 2   there is no run, or it cannot be read
    exit code 3   it was told to stop, and can continue
    exit code 4   it has not ended, but ranks give no sign of life

With --watch the code is that of the run's end: the watch ends with the run, or when no rank gives a sign of life.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from deca_ds.checkpoint.done import ended, is_marked_since, missing_clients, stopped_without
from deca_ds.config.paths import argument as path_argument
from deca_ds.config.paths import look_for
from deca_ds.errors import FAILURE_CODE, CheckpointError
from deca_ds.printing import print_line, wrapped
from deca_ds.run_folder import (
    DONE,
    FAILED,
    HEARTBEATS,
    LOCK,
    SAVED_CONFIG,
    STARTS,
    STOPPED,
    client_metrics,
    job_metrics,
)
from deca_ds.training.pace import duration
from deca_ds.watchdog.heartbeats import SILENCE_S, Heartbeat, read_heartbeats

WELL, STOPPED_CODE, SILENT_CODE = 0, 3, 4
_LOOK_S = 1.0
_TAIL = 1 << 16  # bytes at the end of a metrics file


@dataclass(frozen=True)
class State:
    """How a run is. beats: of the ranks that write on this host's disks. marker: of its end. losses: by client, that of
    its last step, as far as its metrics are here. missing: the clients without which the run has ended, or continues,
    each with the inner step since which it is missing, if that is known here."""

    folder: Path
    beats: Sequence[Heartbeat]
    marker: str | None
    losses: dict[int, float]
    missing: Mapping[int, int | None] = field(default_factory=dict)

    @property
    def silent(self) -> list[Heartbeat]:
        """Ranks of a run that has not ended, and that give no sign of life."""
        return [] if self.marker else [beat for beat in self.beats if beat.silent_s() > SILENCE_S]

    def doing(self, beat: Heartbeat) -> str:
        """Return what a rank does or, of one that is gone with its client, that and since when."""
        is_here = self.marker is None and beat.silent_s() <= SILENCE_S  # a missing client may be about to rejoin
        if beat.client is None or beat.client not in self.missing or is_here:
            return beat.doing
        since = self.missing[beat.client]
        return "missing" if since is None else f"missing since step {since}"

    @property
    def is_over(self) -> bool:
        """Whether there is nothing more to watch."""
        return self.marker is not None or len(self.silent) == len(self.beats)

    @property
    def code(self) -> int:
        """See the module's text."""
        codes = {DONE: WELL, STOPPED: STOPPED_CODE, FAILED: FAILURE_CODE}
        if self.marker is not None:
            return codes[self.marker]
        return SILENT_CODE if self.silent else WELL


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=path_argument, help="the run's output folder")
    parser.add_argument("--watch", action="store_true", help="keep showing it until the run ends")


def run(arguments: argparse.Namespace) -> int:
    """Print the table and how the run ended, if it has; returns the exit code of the module's text."""
    folder, console = arguments.run, Console()
    state = look(folder)
    if arguments.watch and not state.is_over:
        if sys.stdout.isatty():
            with Live(console=console, auto_refresh=False) as live:
                state = watch(folder, lambda state: live.update(_picture(state, console), refresh=True))
            return state.code
        state = watch(folder)
    console.print(status_table(state))
    for line in _below(state):
        print_line(console, line)
    return state.code


def watch(
    folder: Path, show: Callable[[State], None] = lambda state: None, sleep: Callable[[float], None] = time.sleep
) -> State:
    """Look again and again until the run is over; returns what was seen last. show: called with each look."""
    while True:
        state = look(folder)
        show(state)
        if state.is_over:
            return state
        sleep(_LOOK_S)


def look(folder: Path) -> State:
    """Read how the run stands. Raises CheckpointError for a folder that is no run's."""
    marker = ended(folder)  # before the heartbeats, which stop then
    has_ended = is_marked_since(folder, folder / LOCK)
    beats = _beats(folder)
    if not has_ended and any(beat.silent_s() <= SILENCE_S for beat in beats):
        marker = None  # of the job before: one that continues the run is loading
    clients = {beat.client for beat in beats if beat.client is not None}
    losses = {client: _last_loss(client_metrics(folder, client)) for client in clients}
    known = {client: loss for client, loss in losses.items() if loss is not None}
    return State(folder, beats, marker, known, _missing(folder, marker))


def status_table(state: State) -> Table:
    """Tabulate the ranks, a line for each."""
    table = Table(title=str(state.folder), box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, title_justify="left")
    table.padding = (0, 1, 0, 0)  # two blanks between columns, so that a phase keeps to one line of 80 characters
    for column in ("rank", "host", "client", "phase", "step", "loss", "last\nprogress"):
        justify: Any = "left" if column in ("host", "phase") else "right"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=column in ("rank", "step", "loss"))
    silent = set(map(id, state.silent))
    for beat in state.beats:
        client, loss = ("", "") if beat.client is None else (str(beat.client), state.losses.get(beat.client, ""))
        doing = Text(state.doing(beat))
        if id(beat) in silent:
            doing.append(f"\nstale: no sign of life for {duration(beat.silent_s())}", "bold red")
        shown = f"{loss:.3f}" if isinstance(loss, float) else loss
        step = str(beat.step or "")
        table.add_row(str(beat.rank), beat.host, client, doing, step, shown, f"{duration(beat.age_s())} ago")
    return table


def told_end(state: State) -> str:
    """Tell what the run left of its end; "" for one that has not ended."""
    if state.marker is not None:
        with suppress(FileNotFoundError):  # a job that continues the run removes it
            return f"{state.marker}: {(state.folder / state.marker).read_text(errors='replace').strip()}"
    return ""


def _picture(state: State, console: Console) -> Group:
    return Group(status_table(state), *(Text(wrapped(line, console.file)) for line in _below(state)))


def _below(state: State) -> list[str]:
    """Return the lines below the table: how the run ended, or that it was lost."""
    lost = "no rank gives a sign of life, and the run has not ended: it was killed, or this host is cut off"
    return [line for line in (told_end(state), lost if state.is_over and state.marker is None else "") if line]


def _beats(folder: Path) -> list[Heartbeat]:
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {str(folder)!r}", where="RUN", fix=look_for(str(folder)))
    beats = read_heartbeats(folder)
    if not beats:
        run_without = (folder / SAVED_CONFIG).is_file()
        raise CheckpointError(
            f"there are no heartbeats in {str(folder)!r}" + ("" if run_without else ", which is no run's folder"),
            where=str(folder / HEARTBEATS),
            fix="name the run.output of a run that has started; without a shared file system, ask on each host",
        )
    try:
        ranks = sum(json.loads((folder / STARTS).read_text())[-1]["ranks"])
    except (OSError, ValueError, LookupError, TypeError):  # on another host, or being written; or a run of a rank alone
        ranks = 0
    return [beat for beat in beats if beat.rank < (ranks or beat.rank + 1)]  # earlier starts had more


def _missing(folder: Path, marker: str | None) -> dict[int, int | None]:
    """Return the clients that are missing, each with the inner step since which it is, if the job's records tell it:
    they are on the host of the first client that is left."""
    since: dict[int, int | None] = {}
    for record in _memberships(job_metrics(folder)):
        with suppress(LookupError, TypeError):  # of another version of deca_ds
            since = {client: since.get(client, record["from_step"]) for client in record["missing"]}
    if marker in (DONE, STOPPED):
        told = missing_clients(folder) if marker == DONE else stopped_without(folder)
        return {client: since.get(client) for client in told}
    return since


def _memberships(path: Path) -> list[dict[str, Any]]:
    """Read the job's records of who is left, a record for each change."""
    try:
        with open(path, "rb") as file:
            lines = [line for line in file if line.startswith(b'{"kind": "membership"') and line.endswith(b"}\n")]
    except OSError:
        return []
    return [json.loads(line) for line in lines]


def _last_loss(path: Path) -> float | None:
    """Return the loss of the last inner step in a file of metrics; None if there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        if line.startswith(b'{"kind": "step"') and line.endswith(b"}"):
            with suppress(ValueError, LookupError, TypeError):  # of another version of deca_ds
                return float(json.loads(line)["loss"])
    return None

"""Draw what commands show on a terminal, docs/screen_*.svg: python docs/draw_screens.py

The commands' own code draws it, from made-up figures.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from unittest import mock

from rich.console import Console

from deca_ds.algorithm import Schedule
from deca_ds.config.schema import LoggingConfig
from deca_ds.tools import status as status_command
from deca_ds.tools.doctor import table
from deca_ds.tools.doctor.checks import judge
from deca_ds.tools.doctor.facts import Clock, Facts, HostFacts, MpiTrial, Needs
from deca_ds.tools.doctor.sights import Folder, Interface, Sight
from deca_ds.training.display import Display
from deca_ds.training.pace import pace_from
from deca_ds.watchdog.heartbeats import Heartbeat

FOLDER = Path(__file__).parent
WIDTH = 96
NOW = 1_700_000_000.0
_FORMAT = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">
<title>TITLE</title>
<style>
.{unique_id}-matrix {{ font-family: Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: {char_height}px;
  line-height: {line_height}px; font-variant-east-asian: full-width; }}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: Helvetica, Arial, "DejaVu Sans", sans-serif; }}
{styles}
</style>
<defs>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def screen(command: str, name: str, shows: Callable[[Console], None], title: str) -> str:
    """An SVG of a terminal on which a command was typed. shows: prints what it shows. title: for those who do not see
    it."""
    with mock.patch.dict(os.environ, COLUMNS=str(WIDTH), TERM="xterm-256color"):
        os.environ.pop("NO_COLOR", None)
        console = Console(record=True, width=WIDTH, file=_Terminal(), force_terminal=True, color_system="truecolor")
        console.print(f"[bold]$[/] {command}", highlight=False)
        shows(console)
        drawn = console.export_svg(title="", code_format=_FORMAT.replace("TITLE", title), unique_id=name)
    return "\n".join(line.rstrip() for line in drawn.splitlines()) + "\n"


def doctor() -> str:
    """Three hosts, of which one has another deca_ds and one no virtual environment and a read-only disk."""
    facts = _facts()
    return screen(
        "deca doctor --hostfile hosts --config my_run.yaml",
        "doctor",
        lambda console: table.show(console, facts, judge(facts)),
        "deca doctor: a table of checks and hosts with ok and FAIL, and below it each failure with its fix",
    )


def _sight(number: int, **changes: object) -> Sight:
    address = f"10.78.0.{number + 1}"
    packages = {"torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.23.0"}
    return Sight(
        hostname=f"n{number}", python="/opt/venv/bin/python", version="3.11.7", packages=packages,
        code="ecd1f7ef20320f76", code_at="/opt/deca/deca_ds", folder=True,
        gpus=["NVIDIA A100-SXM4-40GB, 550.54, 40960 MiB"] * 4, gpu_error="", torch_gpus=4, mpi="Open MPI v5.0.11",
        mpi_error="", mpirun="mpirun (Open MPI) 5.0.11",
        interfaces=[Interface(name="eth0", addresses=[f"{address}/24"])],
        names={f"n{n}": [f"10.78.0.{n + 1}"] for n in range(3)}, variables={}, port="", fabric=[], files=65536,
        locked=-1, shared=64 * 2**30, memory=400 * 10**9,
    ) | changes  # type: ignore[return-value]  # fmt: skip


def _facts() -> Facts:
    def host(number: int, sight: Sight, error: str = "") -> HostFacts:
        output = Folder(at="/data/runs", free=900 * 10**9, error=error, holds=[])
        return HostFacts(
            4, [f"10.78.0.{number + 1}"], sight, clock=Clock(0.001 * number, 0.004), output=output,
            sees=frozenset({f"n{number}"}),
        )  # fmt: skip

    hosts = {
        "n0": host(0, _sight(0)),
        "n1": host(1, _sight(1, python="/usr/bin/python3"), "Read-only file system"),
        "n2": host(2, _sight(2, code="e2b3e8753ceaa91e")),
    }
    pairs = (("n0", "n1"), ("n0", "n2"), ("n1", "n2"))
    each = {
        name: {host: size for host in hosts}
        for name, size in (("disk", 54 * 10**9), ("gpu_memory", 60 * 10**9), ("memory", 0), ("beside_gpus", 96 * 10**9))
    }
    paths = {host: [("--config", "my_run.yaml"), ("data.train", "/data/rows.jsonl")] for host in hosts}
    needs = Needs("runs/my_run", "never", None, "auto", "auto", False, paths, **each, pairs=pairs)
    links = {pair: {"round_trip_s": 4e-5, "bytes_per_s": 1.1e9} for pair in pairs}
    here = _sight(0)
    return replace(Facts(hosts, here, True, needs=needs, mpi=MpiTrial(2, 2)), links=links)  # type: ignore[arg-type]


def status() -> str:
    """Four ranks on a ring, of which two wait for the client of one that is silent."""
    beats = [
        Heartbeat(0, "n0", 0, "gradient", 412, "layers 8-9", None, 0.4, NOW - 0.5),
        Heartbeat(1, "n1", 1, "gossip", 412, "layers 8-9", 2, 12.0, NOW - 0.7),
        Heartbeat(2, "n2", 2, "gradient", 411, "layers 8-9", None, 3.0, NOW - 21.0),
        Heartbeat(3, "n3", 3, "gossip", 412, "layers 8-9", 2, 12.0, NOW - 0.2),
    ]
    state = status_command.State(Path("runs/my_run"), beats, None, {0: 2.0412, 1: 1.9871, 2: 2.1034, 3: 1.9527})
    with mock.patch("time.time", return_value=NOW):
        return screen(
            "deca status runs/my_run --watch",
            "status",
            lambda console: console.print(status_command.status_table(state)),
            "deca status: every rank with host, client, phase, step, loss and age; one gives no sign of life",
        )


def progress() -> str:
    """The bar of a run on its first rank's terminal."""
    schedule, done = Schedule(rounds=4, blocks=18, inner_steps=48), 411
    display = Display(
        LoggingConfig(), lambda: Heartbeat(0, "n0", 0, "gossip", done, "layers 8-9", None, 0.0, NOW), lambda: False
    )
    with mock.patch("time.monotonic", side_effect=count(0.0, 2.5)):
        display.begin(schedule, done - 2, pace_from(schedule, done - 2, every=864))
        for step in (done - 1, done):
            record = {"round": 0, "block": "layers 8-9", "loss": 2.0412, "tokens": 8192}
            display.step(step, schedule.step(step - 1).block, record)
        display.evaluated(41.0, 0.0213)
    return screen(
        "deepspeed --quiet --hostfile hosts launchers/train.py --config my_run.yaml",
        "progress",
        lambda console: console.print(display.picture()),
        "the progress bar: step, remaining time, round, block, loss, tokens per second and consensus distance",
    )


if __name__ == "__main__":
    for draws in (doctor, status, progress):
        (FOLDER / f"screen_{draws.__name__}.svg").write_text(draws(), encoding="utf-8")

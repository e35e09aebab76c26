"""What becomes of stdout and stderr does not decide a run: real processes with streams that cannot be written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = """
import sys
from deca_ds.training.terminal import own_streams
own_streams(patience_s=0.2)
from rich.console import Console
for stream in (sys.stdout, sys.stderr):
    print("x\\u2501" * 100_000, file=stream, flush=True)
Console(stderr=True).print("[bold]a table")
with open(sys.argv[1], "w") as file:
    assert file.fileno() > 2
    file.write("through")
"""


def run(target: Path, *arguments: str, redirect: str = "", **environment: str) -> subprocess.CompletedProcess:
    command = f'"$0" -c "$1" "$2" {redirect}'
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}", sys.executable, WORKER, str(target), *arguments],
        capture_output=True, timeout=60, env=os.environ | environment,
    )  # fmt: skip


@pytest.mark.parametrize(
    "redirect",
    ["2>&1 | head -c 10", ">&-", ">&- 2>&- <&-", ">/dev/full 2>&1", "2>&1 | (exec <&-; true)"],
    ids=["closed pipe", "closed stdout", "all closed", "full disk", "pipe closed at once"],
)
def test_the_work_is_done_and_the_exit_code_is_0(tmp_path: Path, redirect: str) -> None:
    assert run(tmp_path / "end", redirect=redirect).returncode == 0
    assert (tmp_path / "end").read_text() == "through"


def test_a_reader_that_does_not_read_holds_nobody_up(tmp_path: Path) -> None:
    end = tmp_path / "end"
    finished = run(end, redirect='2>&1 | (while [ ! -s "$2" ]; do sleep 0.05; done)')
    assert finished.returncode == 0 and end.read_text() == "through"


def test_what_a_terminal_cannot_show_is_written_as_a_number(tmp_path: Path) -> None:
    finished = run(tmp_path / "end", PYTHONIOENCODING="ascii", PYTHONUNBUFFERED="1")
    assert finished.returncode == 0 and (tmp_path / "end").read_text() == "through"
    assert finished.stdout == b"x\\u2501" * 100_000 + b"\n", "and nothing is lost"


STOPPABLE = """
import time
from deca_ds.training.terminal import on_interrupt
asked = []
on_interrupt(lambda *_: asked.append(1), "a line that says what happens")
print("ready", flush=True)
while not asked:
    time.sleep(0.01)
print("asked", flush=True)
while True:
    time.sleep(0.01)
"""


def test_the_first_interrupt_asks_and_the_second_one_ends_the_process_without_a_traceback() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPABLE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "asked\n"
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT and told.strip() == "a line that says what happens"

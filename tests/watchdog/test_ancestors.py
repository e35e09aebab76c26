"""Whose end is a reason for a rank to stop, whose to end, and whose is none."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from jobs import REPOSITORY, wait_until
from torch.distributed import HashStore

from deca_ds.launch.launcher import Launch
from deca_ds.launch.store import JobStore
from deca_ds.watchdog.ancestors import Ancestors, is_runner
from deca_ds.watchdog.ending import Ending
from deca_ds.watchdog.failure import Failure
from deca_ds.watchdog.guard import JobGuard

START = "import subprocess, sys; subprocess.Popen(sys.argv[1:]).wait()"
SHELL = ["sh", "-c", '"$@"; true', "sh"]  # not its last command, which would take its place
RANK = """
import os, sys, time
import deca_ds
while not os.path.exists(sys.argv[1]):  # as long as a slow import takes
    print("imports", flush=True)
    time.sleep(0.05)
from deca_ds.launch.launcher import Launch
from deca_ds.watchdog.ancestors import Ancestors
from deca_ds.watchdog.stop import StopByCommit
ancestors, stop = Ancestors(), StopByCommit()
while True:  # until the test ends it
    ancestors.look(Launch("deepspeed", 0, 2, 0, None), stop)
    stop.heard(not stop.pending)
    print(int(ancestors.launcher_is_gone()), int(ancestors.runner_is_gone()), flush=True)
    time.sleep(0.05)
"""


class Chain:
    """A rank, and those above it: python that runs a file of that name, or a shell. The topmost comes first.
    imports: the rank does so until `go_on`."""

    def __init__(self, folder: Path, above: list[str], imports: bool):
        self.imported = folder / "imported"
        command = [sys.executable, "-c", RANK, str(self.imported)]
        if not imports:
            self.go_on()
        for name in reversed(above):
            (folder / name).write_text(START)
            command = [*(SHELL if name == "sh" else [sys.executable, str(folder / name)]), *command]
        self.output = folder / "output"
        with self.output.open("w") as output:
            self.top = subprocess.Popen(command, stdout=output, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
        self.processes = [psutil.Process(self.top.pid)]
        wait_until(lambda: "\n" in self.output.read_text(), "a look around", process=self.top)
        self.processes += self.processes[0].children(recursive=True)
        assert len(self.processes) == len(above) + 1

    def go_on(self) -> None:
        self.imported.touch()

    def end(self, place: int) -> None:
        """One of those above, and nobody else; then the one below it has another parent."""
        above, below = self.processes[place : place + 2]
        above.terminate()
        wait_until(lambda: below.ppid() != above.pid, "another parent")

    def tells(self) -> str:
        """What the rank finds from here on: whether the launcher is gone, and whether the runner is."""
        length = len(self.output.read_text())
        wait_until(lambda: self.output.read_text()[length:].count("\n") > 2, "another look")
        return self.output.read_text().rpartition("\n")[0].splitlines()[-1]


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., Chain]]:
    made: list[Chain] = []

    def start(*above: str, imports: bool = False) -> Chain:
        made.append(Chain(tmp_path, list(above), imports))
        return made[-1]

    yield start
    for chain in made:
        for process in chain.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        chain.top.wait()


def test_the_runner_and_the_launcher_count_and_nobody_above_them(start):
    chain = start("shell", "deepspeed", "launch")
    found = [chain.tells()]
    for place in range(3):
        chain.end(place)
        found.append(chain.tells())
    assert found[:3] == ["0 0", "0 0", "0 1"] and found[3].startswith("1")


@pytest.mark.parametrize("above", [("nohup", "launch"), ("sh",)])
def test_what_starts_a_launcher_or_a_rank_may_go(start, above):
    chain = start(*above)
    chain.end(0)
    assert chain.tells() == "0 0"


@pytest.mark.parametrize(
    ("above", "ends", "expected"),
    [
        (("mpirun",), 0, "1 0"),
        (("sh",), 0, "0 0"),
        (("deepspeed", "mpirun"), 0, "0 1"),
        (("deepspeed", "deepspeed.launcher.launch"), 1, "1 0"),
        (("nohup", "launch"), 0, "0 0"),
    ],
)
def test_who_goes_while_the_rank_still_imports_is_missed_when_it_begins(start, above, ends, expected):
    chain = start(*above, imports=True)
    assert chain.tells() == "imports"
    chain.end(ends)
    chain.go_on()
    wait_until(lambda: chain.tells() != "imports", "a look around")
    assert chain.tells() == expected


def test_a_fork_of_who_has_imported_notes_its_own_parent():
    """As a server of forks that have imported all, or a script that starts its ranks by itself."""
    own = "print(started_by().parent.pid == os.getppid(), flush=True)"
    code = "import os; from deca_ds.watchdog.started_by import started_by\n"
    code += f"child = os.fork(); child and os.wait(); {own}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("True\n" * 2, "")


@pytest.mark.parametrize(
    ("command", "is_one"),
    [
        ("python .venv/bin/deepspeed --hostfile hosts launchers/train.py", True),
        ("python -u -m deepspeed.launcher.runner launchers/train.py", True),
        ("python -u -m deepspeed.launcher.launch --world_info=e30= launchers/train.py", False),
        ("python launchers/train.py --config deepspeed", False),
        ("-bash", False),
        ("", False),
    ],
)
def test_which_commands_are_runners(command, is_one):
    assert is_runner(command.split()) == is_one


@pytest.mark.parametrize("launcher", ["deepspeed.launcher.launch", "mpirun"])
def test_without_the_runner_deepspeeds_launcher_is_ended_before_it_kills_ranks_that_are_saving(start, launcher):
    """After Ctrl-C, which ends the runner, it would kill them in 30 s. mpirun's ranks could not go on without it."""
    chain = start("deepspeed", launcher)
    assert chain.tells() == "0 0"
    chain.end(0)
    told = "0 1" if launcher == "mpirun" else "1 0"
    wait_until(lambda: chain.tells() == told, "another look")
    assert chain.tells() == told


class Gone(Ancestors):
    """Of whom one has gone."""

    def __init__(self, who: str):
        super().__init__()
        self.who = who

    def launcher_is_gone(self) -> bool:
        return self.who == "launcher"

    def runner_is_gone(self) -> bool:
        return self.who == "runner"


@pytest.mark.parametrize(("launcher", "ranks"), [("deepspeed", 1), ("deepspeed", 2), ("python", 1)])
@pytest.mark.parametrize("who", ["runner", "launcher"])
def test_without_its_launcher_a_rank_ends_and_without_the_runner_it_stops(monkeypatch, capfd, who, launcher, ranks):
    """A single rank that nobody has launched continues."""
    left: list[Failure] = []

    def leave(ending: Ending, report: Failure, *, mark: bool = True) -> None:
        left.append(report)
        ending.begun.release()  # the thread goes on, until it is closed

    monkeypatch.setattr(Ending, "leave", leave)
    store = HashStore()
    job = JobStore(store, None, timedelta(seconds=100))
    made = JobGuard(Launch(launcher, 0, ranks, 0, None), job, ancestors=Gone(who))
    stops = launcher == "deepspeed" and who == "runner"
    ends = launcher == "deepspeed" and who == "launcher"
    wait_until(lambda: left if ends else made.stop.pending if stops else store.check(["heartbeat/0"]), "a look")
    made._watcher.close()
    assert bool(left) == ends and made.stop.pending == stops
    assert ("`deepspeed` is gone" in capfd.readouterr().err) == stops

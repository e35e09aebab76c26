"""What a run shows of itself on a terminal and without one."""

import io
import re
import sys
import threading
import time

import pytest
from rich.console import Console

from deca_ds.algorithm.schedule import Schedule
from deca_ds.config.schema import LoggingConfig
from deca_ds.training.display import Display
from deca_ds.training.pace import pace_from
from deca_ds.watchdog.heartbeats import Heartbeat


def display(idle_s: float = 0.0, stops: bool = False, **keys) -> Display:
    return Display(
        LoggingConfig(**keys),
        lambda: Heartbeat(0, "n0", 0, "gossip", 3, "layers 0-1", 1, idle_s, time.time()),
        lambda: stops,
    )


def begun(shown: Display) -> Display:
    schedule = Schedule(rounds=2, blocks=3, inner_steps=4)
    shown.begin(schedule, 0, pace_from(schedule, 0, every=0))
    return shown


RECORD = {"round": 0, "block": "layers 0-1", "loss": 2.5, "tokens": 100}


def test_the_start_the_steps_and_the_evaluations_are_told():
    shown = display()
    assert shown.facts() == ["starting: gossip, waiting for client 1"]
    begun(shown).scored("own set", 8, 20)
    assert shown.facts() == ["step 0 of 24", "evaluation, own set: 8 of 20 sequences"]
    shown.evaluated(1.0, 0.25)
    shown.step(1, 0, RECORD)
    told = ", ".join(shown.facts())
    assert told.startswith("step 1 of 24 (4%), round 1 of 2, block layers 0-1, loss 2.5000, ")
    assert "tokens/s" in told and "consensus distance 0.25 at step 0" in told and told.endswith(" left")


def test_a_run_that_stands_still_says_what_it_waits_for():
    assert begun(display(idle_s=90)).facts()[-1] == "for 1:30 at: gossip, waiting for client 1"


def test_a_run_that_was_told_to_stop_says_so_until_it_has_stopped():
    """A launcher's traceback may stand between that and the line in which the rank said it first."""
    shown = begun(display(stops=True))
    shown.step(1, 0, RECORD)
    assert shown.facts()[-1] == "stopping"
    console = Console(width=80, file=io.StringIO())
    console.print(shown.picture())
    *_, last = console.file.getvalue().splitlines()
    assert last.startswith("stopping, with a checkpoint") and " left" not in console.file.getvalue()


def test_without_a_terminal_lines_come_by_themselves(monkeypatch):
    written = threading.Event()

    class Log(io.StringIO):
        def flush(self):
            written.set()

    log = Log()
    monkeypatch.setattr("sys.stderr", log)
    shown = begun(display(progress_s=0.01))
    shown.show()
    shown.step(1, 0, RECORD)
    written.clear()
    assert written.wait(100)
    shown.close()
    assert "step 1 of 24" in log.getvalue() and "\x1b" not in log.getvalue() and "\r" not in log.getvalue()


def test_switched_off_nothing_is_shown(monkeypatch):
    before = set(threading.enumerate())
    shown = display(progress=False, progress_s=0.001)
    shown.show()
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize(
    ("width", "told"),
    [
        (200, "round 1 of 2, block layers 0-1, loss 2.5000, N tokens/s, consensus distance 0.25 at step 1"),
        (80, "round 1 of 2, block layers 0-1, loss 2.5000, consensus distance 0.25"),
        (50, "round 1 of 2, block layers 0-1, loss 2.5000"),
        (40, "loss 2.5000"),
    ],
)
def test_the_bar_takes_two_lines_and_leaves_out_what_matters_least_where_they_are_short(width, told):
    shown = begun(display())
    shown.step(1, 0, RECORD | {"tokens": 10**9})
    shown.evaluated(1.0, 0.25)
    console = Console(width=width, file=io.StringIO())
    console.print(shown.picture())
    bar, facts = console.file.getvalue().splitlines()
    assert max(len(bar), len(facts)) <= width and "1/24" in bar and "left" in bar
    assert re.sub(r"[\d,]{9,} tokens", "N tokens", facts).strip() == told
    shown.scored("common set", 5, 10)
    console.print(shown.picture())
    assert "5/10" in console.file.getvalue()


def test_where_a_run_stands_still_matters_most():
    shown = begun(display(idle_s=90))
    shown.step(1, 0, RECORD)
    console = Console(width=60, file=io.StringIO())
    console.print(shown.picture())
    assert console.file.getvalue().splitlines()[1].strip() == "loss 2.5000, for 1:30 at: gossip, waiting for client 1"


def test_the_display_may_ask_ranks_while_the_run_continues():
    """What is noted between two of the thread's steps must not break what it is about to say."""
    shown = begun(display())
    closed, failures = threading.Event(), []

    def look():
        try:
            while not closed.is_set():
                shown.facts()
                shown.picture()
        except Exception as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=look)
    thread.start()
    try:
        for step in range(3000):
            shown.step(step, step, RECORD)
            shown.scored("own set", 1, 2)
            shown.evaluated(1.0, None)
    finally:
        closed.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert not failures

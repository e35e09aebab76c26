"""How far the run is, on the job leader's stderr: a bar that moves on a terminal, else a line every so many seconds.

The main thread only notes what it has done; a thread that wakes up a few times a second, or more rarely, shows it. What
is shown is of this rank's client.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from deca_ds.algorithm import Schedule
from deca_ds.config.monitoring import LoggingConfig
from deca_ds.printing import print_wrapped
from deca_ds.training.pace import Pace, duration
from deca_ds.watchdog.heartbeats import Heartbeat

_PER_SECOND = 4.0  # pictures of the bar
_STOPS = "stopping, with a checkpoint of what has been trained"  # also below a traceback of the launcher's
_STILL_S = 20.0  # a rank that has not moved on for so long shows at what


class Fact(NamedTuple):
    """How far the run is, in a few words. weight: where there is no room for all facts, the lightest go first. shorter:
    what then stands for it."""

    weight: int
    text: str
    shorter: Fact | None = None


@dataclass(frozen=True)
class Line:
    """The facts that a line has room for."""

    facts: Sequence[Fact]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.within(options.max_width), "dim", no_wrap=True, overflow="ellipsis")

    def within(self, width: int) -> str:
        """Return the facts in at most `width` characters, or the heaviest one."""
        kept = list(self.facts)
        while len(line := ", ".join(fact.text for fact in kept)) > width and len(kept) > 1:
            lightest = min(range(len(kept)), key=lambda place: kept[place].weight)
            shorter = kept[lightest].shorter
            kept[lightest : lightest + 1] = [] if shorter is None else [shorter]
        return line


class Display:
    """What one rank shows of the run after `show`. beat: returns this rank's heartbeat. stops: returns whether the job
    has been told to stop."""

    def __init__(self, config: LoggingConfig, beat: Callable[[], Heartbeat], stops: Callable[[], bool]):
        self._config, self._beat, self._stops = config, beat, stops
        self._rounds = self._steps = self._done = 0
        self._place = ""
        self._distance: Fact | None = None
        self._pace: Pace | None = None
        self._scored: tuple[str, int, int] | None = None  # in an evaluation: set, rows done, rows
        self._marked = time.monotonic()
        self._live: Live | None = None
        self._closed = threading.Event()
        self._shown = False

    def show(self) -> None:
        """Show the progress from now on. A terminal gets a bar when training begins."""
        if self._shown or not self._config.progress:
            return
        self._shown = True
        if not _moves(sys.stderr):
            threading.Thread(target=self._print_lines, name="progress", daemon=True).start()
        elif self._pace is not None:
            self._start_bar()

    def begin(self, schedule: Schedule, done: int, pace: Pace) -> None:
        """Note that training begins, after `done` inner steps."""
        self._rounds, self._steps, self._done, self._pace = schedule.rounds, len(schedule), done, pace
        self._marked = time.monotonic()
        if self._shown and _moves(sys.stderr):
            self._start_bar()

    def step(self, done: int, block: int, record: Mapping[str, Any]) -> None:
        """Note that the `done`-th inner step, on block number `block`, is done. record: its metrics."""
        now = time.monotonic()
        if self._pace is not None:
            self._pace.step(block, now - self._marked, record["loss"], record["tokens"])
        self._done, self._marked = done, now
        self._place = f"round {record['round'] + 1} of {self._rounds}, block {record['block']}"

    def scored(self, what: str, done: int, rows: int) -> None:
        """Note that `done` of the `rows` rows of the set `what` have been scored."""
        self._scored = what, done, rows

    def evaluated(self, seconds: float, distance: float | None) -> None:
        """Note that an evaluation is done. distance: consensus distance."""
        if self._pace is not None:
            self._pace.evaluated(seconds)
        if distance is not None:
            told = f"consensus distance {distance:.3g}"
            self._distance = Fact(0, f"{told} at step {self._done}", Fact(2, told))
        self._scored, self._marked = None, time.monotonic()

    def close(self) -> None:
        """Show nothing more; the bar stays as it is."""
        self._closed.set()
        if self._live is not None:
            self._live.stop()

    def facts(self) -> list[str]:
        """Say how far the run is, each fact in a few words."""
        if self._pace is None:
            return [f"starting: {self._beat().doing}"]
        if (scored := self._scored) is not None:  # read once: the main thread continues
            what, done, rows = scored
            now = [f"step {self._done} of {self._steps}", f"evaluation, {what}: {done} of {rows} sequences"]
        else:
            now = [f"step {self._done} of {self._steps} ({self._done / max(1, self._steps):.0%})"]
            now += [fact.text for fact in self._training()]
        return [*now, *self._left(), *self._still()]

    def _training(self) -> Iterable[Fact]:
        pace, distance = self._pace, self._distance
        if self._place:
            yield Fact(3, self._place)
        if pace is not None and pace.loss is not None:
            yield Fact(4, f"loss {pace.loss:.4f}")
        if pace is not None and pace.tokens_per_second is not None:
            yield Fact(1, f"{pace.tokens_per_second:,.0f} tokens/s")
        if distance is not None:
            yield distance

    def _left(self) -> Iterable[str]:
        if self._stops():
            return ("stopping",)
        left = None if self._pace is None else self._pace.left_s
        return () if left is None else (f"{duration(left)} left",)

    def _still(self) -> Iterable[str]:
        beat = self._beat()
        if beat.idle_s > _STILL_S:
            yield f"for {duration(beat.idle_s)} at: {beat.doing}"

    def _print_lines(self) -> None:
        while not self._closed.wait(self._config.progress_s):
            print_wrapped(", ".join(self.facts()))

    def _start_bar(self) -> None:
        if self._live is None:
            console = Console(stderr=True)
            self._live = Live(console=console, refresh_per_second=_PER_SECOND, get_renderable=self.picture)
            self._live.start()
            console.show_cursor(True)  # a run that fails ends without a word to the terminal

    def picture(self) -> RenderableType:
        """Return the bar, and below it the other facts."""
        grid = Table.grid(padding=(0, 1), expand=True)
        for ratio in (None, 1, None, None):
            grid.add_column(ratio=ratio, no_wrap=True)
        what, done, total = self._scored or ("", self._done, self._steps)
        name = f"evaluation, {what}" if what else "training"
        left = " ".join(self._left())
        grid.add_row(Text(name, "bold"), ProgressBar(max(1, total), done), f"{done}/{total}", left)
        stopping = [Text(_STOPS, "bold")] if self._stops() else []
        return Group(grid, Line([*self._training(), *(Fact(5, text) for text in self._still())]), *stopping)


def _moves(stream: Any) -> bool:
    """Return whether text that is written to `stream` can be overwritten."""
    return bool(stream.isatty()) and not Console(file=stream).is_dumb_terminal

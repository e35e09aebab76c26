"""The answers of several models on the screen, while they come: in columns, or below each other where it is narrow."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from deca_ds.printing import print_line

_COLUMN = 40  # characters that a line of an answer needs to be read with ease


class Screen(Protocol):
    """A context in which the answers to one prompt are shown."""

    def __enter__(self) -> Screen: ...

    def __exit__(self, *_: object) -> None: ...

    def begin(self, speaker: int) -> None:
        """Let this one speak from now on."""

    def say(self, text: str) -> None:
        """Show the next piece of what it says."""


def screen(console: Console, names: Sequence[str]) -> Screen:
    """Choose the screen that fits the console. names: of the speakers; a single one is not named."""
    beside = len(names) > 1 and console.is_terminal and console.width // len(names) >= _COLUMN
    return Beside(console, names) if beside else Below(console, names)


class Below:
    """One answer after the other. Lines break between words; what is no terminal gets the lines as they are."""

    def __init__(self, console: Console, names: Sequence[str]):
        self._console, self._names = console, names
        self._width = console.width if console.is_terminal else None
        self._at = 0  # characters in the line

    def __enter__(self) -> Below:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_line()

    def begin(self, speaker: int) -> None:
        """See Screen."""
        self._end_line()
        if len(self._names) > 1:
            self._write("\n" * (speaker > 0))
            print_line(self._console, self._names[speaker], "bold")

    def say(self, text: str) -> None:
        """See Screen."""
        for part in re.findall(r"\n|[^\S\n]+|\S+", text):
            length = 0 if part == "\n" else cell_len(part)
            if self._width is not None and self._at and self._at + length > self._width:
                self._write("\n")
                self._at = 0
                if part.isspace():
                    continue
            self._write(part)
            self._at = 0 if part == "\n" else self._at + length

    def _end_line(self) -> None:
        if self._at:
            self._write("\n")
            self._at = 0

    def _write(self, text: str) -> None:
        self._console.out(text, end="", highlight=False)
        self._console.file.flush()


class Beside:
    """A column each."""

    def __init__(self, console: Console, names: Sequence[str]):
        self._names, self._said, self._speaker = names, [""] * len(names), 0
        self._live = Live(console=console, auto_refresh=False, get_renderable=self.picture)

    def __enter__(self) -> Beside:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def begin(self, speaker: int) -> None:
        """See Screen."""
        self._speaker = speaker

    def say(self, text: str) -> None:
        """See Screen."""
        self._said[self._speaker] += text
        self._live.refresh()

    def picture(self) -> Table:
        """Draw all that has been said."""
        table = Table(box=None, expand=True, pad_edge=False, padding=(0, 2, 0, 0))
        for name in self._names:
            table.add_column(Text(name, "bold", overflow="fold"), ratio=1, overflow="fold")
        table.add_row(*map(Text, self._said))
        return table

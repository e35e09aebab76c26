"""Text for people: lines break between words on a terminal, and stay whole in files and pipes, so that a search finds
what they say."""

from __future__ import annotations

import os
import re
import sys
import textwrap
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

# "  fix:   ", or "  deca report RUN    " before what that does: the rest of the line goes on below its first word
_HANG = re.compile(r"\s+(?:\w+:\s+|\S(?:\S| (?! ))*\s{2,})?")


def print_wrapped(text: str, file: IO[str] | None = None) -> None:
    """Print at once. file: stderr if None."""
    file = sys.stderr if file is None else file
    print(wrapped(text, file) + "\n", end="", file=file, flush=True)  # in one piece: other ranks write there, too


def print_line(console: Console, text: str, style: str = "", head: tuple[str, str] = ("WARNING:", "bold")) -> None:
    """Print a line on a console as `print_wrapped` does, and with a style. head: a first word, and the style that it
    gets where `text` has it."""
    from rich.text import Text  # here: it takes a while, and most have no need of it

    line, (word, emphasis) = Text(wrapped(text, console.file), style), head
    if text.startswith(word):
        line.stylize(emphasis, 0, len(word))
    console.print(line, soft_wrap=True)


def wrapped(text: str, file: IO[str]) -> str:
    """Return `text`, in lines as `file` wants them. A word that is longer than a line, as a path may be, stays
    whole."""
    width = _columns(file)
    if not width:
        return text
    return "\n".join(_broken(line, width) for line in text.split("\n"))


def _broken(line: str, width: int) -> str:
    if len(line) <= width:
        return line
    hang = _HANG.match(line)
    indent = " " * min(hang.end() if hang else 0, 2 * width // 3)
    return textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _columns(file: IO[str]) -> int:
    """Return how wide the terminal is, 0 if it is none."""
    # mpirun shows its ranks a terminal, also into a file
    if not file.isatty() or "OMPI_COMM_WORLD_RANK" in os.environ:
        return 0
    if (set_by_user := os.environ.get("COLUMNS", "")).isdecimal():
        return int(set_by_user)
    try:
        return os.get_terminal_size(file.fileno()).columns
    except (OSError, ValueError):  # no file of the system
        return 0

"""Text for people breaks between words on a terminal, and nowhere else."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
from pathlib import Path

import pytest
from rich.console import Console

from deca_ds.printing import print_line, print_wrapped, wrapped

LONG = (
    "ERROR: the model and the data do not fit together\n  where: data.train, in a file with a long name\n  fix:   look"
)


@pytest.fixture
def terminal(monkeypatch):
    """A function that opens a terminal of so many columns, and gives what has been written to it."""
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.delenv("OMPI_COMM_WORLD_RANK", raising=False)
    descriptors = []

    def opened(columns: int):
        here, there = pty.openpty()
        fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        descriptors.append(here)
        stream = os.fdopen(there, "w")

        def seen() -> str:
            stream.flush()
            return os.read(here, 1 << 16).decode().replace("\r\n", "\n")

        return stream, seen

    yield opened
    for descriptor in descriptors:
        os.close(descriptor)


def test_lines_break_between_words_and_hang_below_what_they_say(terminal):
    stream, seen = terminal(32)
    print_wrapped(LONG, stream)
    assert seen().splitlines() == [
        "ERROR: the model and the data do",
        "not fit together",
        "  where: data.train, in a file",
        "         with a long name",
        "  fix:   look",
    ]


def test_what_a_command_does_stays_beside_it(terminal):
    stream, _ = terminal(50)
    told = wrapped("  deca export runs/x MODEL    a folder for from_pretrained", stream)
    assert told.splitlines() == ["  deca export runs/x MODEL    a folder for", " " * 30 + "from_pretrained"]


def test_a_path_stays_whole(terminal):
    stream, _ = terminal(20)
    path = "/data/a-long/folder-with-hyphens/file.jsonl"
    assert wrapped(f"cannot read {path} here", stream).splitlines() == ["cannot read", path, "here"]


def test_a_file_and_a_pipe_get_whole_lines(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    with open(tmp_path / "log", "w+") as log:
        print_wrapped(LONG, log)
        print_line(Console(file=log), f"WARNING: {LONG}")
        log.seek(0)
        assert log.read() == f"{LONG}\nWARNING: {LONG}\n"
    assert wrapped(LONG, io.StringIO()) == LONG


def test_what_mpirun_shows_its_ranks_may_be_a_file(terminal, monkeypatch):
    stream, _ = terminal(20)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    assert wrapped(LONG, stream) == LONG


def test_columns_of_the_environment_count_and_a_terminal_without_width_breaks_nothing(terminal, monkeypatch):
    stream, _ = terminal(0)
    assert wrapped(LONG, stream) == LONG
    monkeypatch.setenv("COLUMNS", "20")
    assert max(map(len, wrapped(LONG, stream).splitlines())) <= 20


def test_stderr_is_where_it_goes(terminal, monkeypatch):
    stream, seen = terminal(20)
    monkeypatch.setattr(sys, "stderr", stream)
    print_wrapped("more words than there is room for")
    assert seen() == "more words than\nthere is room for\n"


def test_a_console_gets_the_first_word_in_bold_and_no_markup(terminal):
    stream, seen = terminal(22)
    print_line(Console(file=stream, color_system="standard", force_terminal=True), "WARNING: [bold] stays as it is")
    assert seen() == "\x1b[1mWARNING:\x1b[0m [bold] stays\nas it is\n"


FOR_PROGRAMS = r"print\((\)|json\.|as_json)"


def test_whatever_is_for_people_goes_this_way():
    """`print` would break words on a terminal, and rich whole lines in a file."""
    package = Path(__file__).parent.parent / "deca_ds"
    others = ("printing.py", "launchers/where.py", "tools/doctor/agent.py", "tools/card.py")  # programs read these
    for path in package.rglob("*.py"):
        if (name := path.relative_to(package).as_posix()).startswith(others):
            continue
        for line in map(str.strip, path.read_text().splitlines()):
            assert not line.startswith("print(") or re.match(FOR_PROGRAMS, line), f"{name}: {line}"
            assert "soft_wrap=" not in line, f"{name}: {line}"

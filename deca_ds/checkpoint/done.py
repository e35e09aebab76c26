"""The markers of a run that has finished, or has stopped, and which clients were gone by then."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

DONE, STOPPED = "DONE", "STOPPED"
_MISSING = "missing clients:"


def mark_done(run: Path, steps: str, missing: Sequence[int] = ()) -> None:
    """Write the marker. steps: how many the run had, for people. missing: clients that died before the end."""
    _mark(run / DONE, steps, missing)


def mark_stopped(run: Path, steps: str, missing: Sequence[int] = ()) -> None:
    """The same for a run that can go on. steps: done so far."""
    _mark(run / STOPPED, steps, missing)


def is_done(run: Path) -> bool:
    """Whether the run has come to its end."""
    return (run / DONE).is_file()


def missing_clients(run: Path) -> list[int]:
    """The clients that died before the run's end, ascending; empty without a marker."""
    return _missing(run / DONE)


def stopped_without(run: Path) -> list[int]:
    """The clients that had died when the run stopped, ascending; empty without a marker."""
    return _missing(run / STOPPED)


def _mark(marker: Path, steps: str, missing: Sequence[int]) -> None:
    lines = [steps] + ([f"{_MISSING} {', '.join(map(str, missing))}"] if missing else [])
    marker.write_text("\n".join(lines) + "\n")


def _missing(marker: Path) -> list[int]:
    lines = marker.read_text().splitlines() if marker.is_file() else []
    return [int(number) for line in lines if line.startswith(_MISSING) for number in re.findall(r"\d+", line)]

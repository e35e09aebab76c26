"""The marker of a finished run, and which clients did not finish with it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

DONE = "DONE"
_MISSING = "missing clients:"


def mark_done(run: Path, steps: str, missing: Sequence[int] = ()) -> None:
    """Write the marker. steps: how many the run had, for people. missing: clients that died before the end."""
    lines = [steps] + ([f"{_MISSING} {', '.join(map(str, missing))}"] if missing else [])
    (run / DONE).write_text("\n".join(lines) + "\n")


def missing_clients(run: Path) -> list[int]:
    """The clients that died before the run's end, ascending; empty without a marker."""
    if not (run / DONE).is_file():
        return []
    line = next((line for line in (run / DONE).read_text().splitlines() if line.startswith(_MISSING)), "")
    return [int(number) for number in re.findall(r"\d+", line)]

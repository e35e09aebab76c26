"""The marker of how a run has ended, DONE, STOPPED or FAILED, and which clients were gone by then.

One rank writes DONE or STOPPED when all ranks have saved what is theirs, and a rank may fail at the same moment. Then
FAILED gives way: the rank that writes DONE or STOPPED removes FAILED afterwards, and a rank that writes FAILED
(watchdog/failure.py) removes it again if it finds one of the others afterwards. If a rank is killed before it has done
so, two markers stay, and `ended` names the one that counts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from deca_ds.checkpoint.files import sync
from deca_ds.errors import CheckpointError, in_words
from deca_ds.run_folder import BASE, DONE, FAILED, METRICS, STOPPED

_STEPS, _MISSING = "inner steps:", "missing clients:"  # fields of DONE and STOPPED, a line each


def mark_done(run: Path, steps: int, missing: Sequence[int] = ()) -> None:
    """Write the marker, once all that belongs to the run is on the disk. steps: inner steps of the run. missing:
    clients that died before the end. Raises CheckpointError if that cannot be."""
    _mark(run / DONE, [f"{_STEPS} {steps} of {steps}"], missing)


def mark_stopped(
    run: Path, how: str, missing: Sequence[int] = (), *, steps: tuple[int, int] | None = None, why: str = ""
) -> None:
    """Mark the run as stopped, so that it can continue. how: to continue, for people. steps: inner steps done so far,
    and of the whole run; None before training. why: it has stopped by itself, for people."""
    first = "stopped before training began" if steps is None else f"{_STEPS} {steps[0]} of {steps[1]}"
    _mark(run / STOPPED, [first, *([f"because: {why}"] if why else [])], missing, f"to continue: {how}")


def ended(run: Path) -> str | None:
    """Return the name of the marker that tells how the run has ended; None if it has not."""
    return next((name for name in (DONE, STOPPED, FAILED) if (run / name).is_file()), None)


def is_marked_since(run: Path, taken: Path) -> bool:
    """Return whether the marker is of the job that has taken the folder last: not older than the file `taken`, which
    that job wrote first. A job that continues a run leaves the marker of the one before until it has loaded."""
    marker = ended(run)
    if marker is None:
        return False
    with suppress(FileNotFoundError):
        return (run / marker).stat().st_mtime_ns >= taken.stat().st_mtime_ns
    return ended(run) is not None


def is_done(run: Path) -> bool:
    """Return whether the run has come to its end."""
    return (run / DONE).is_file()


def inner_steps(run: Path) -> int:
    """Return the inner steps of a run that is done. Raises CheckpointError if its marker does not tell."""
    steps = steps_told((run / DONE).read_text(errors="replace"))
    if steps is None:
        raise CheckpointError(
            f"{DONE} does not say how many inner steps the run had",
            where=str(run / DONE),
            fix=f"if an earlier version of deca_ds wrote it, write `{_STEPS} N of N` as its first line; if it is not "
            "this trainer's, remove it: run.resume=auto then looks at the checkpoints",
        )
    return steps


def steps_told(text: str) -> int | None:
    """Return the inner steps of the whole run as a marker tells them; None if it does not. text: of the marker."""
    found = re.search(rf"^{_STEPS} \d+ of (\d+)$", text, re.MULTILINE)
    return None if found is None else int(found[1])


def missing_clients(run: Path) -> list[int]:
    """Return the clients that died before the run's end, ascending; empty without a marker."""
    return _missing(run / DONE)


def stopped_without(run: Path) -> list[int]:
    """Return the clients that had died when the run stopped, ascending; empty without a marker."""
    return _missing(run / STOPPED)


def _mark(marker: Path, first: Sequence[str], missing: Sequence[int], *more: str) -> None:
    run, partial = marker.parent, marker.with_name(f".{marker.name}.partial")
    lines = [*first, *([f"{_MISSING} {', '.join(map(str, missing))}"] if missing else []), *more]
    try:
        # slices are synchronised when they are written
        for path in (*run.glob("*.*"), *run.glob(f"{BASE}/**/*"), *run.glob(f"{METRICS}/*"), run / BASE, run / METRICS):
            if path.exists():
                sync(path)
        partial.write_text("\n".join(lines) + "\n")
        sync(partial)
        os.replace(partial, marker)
        for name in {STOPPED, FAILED} - {marker.name}:
            (run / name).unlink(missing_ok=True)
        sync(run)
    except OSError as error:
        raise CheckpointError(
            f"cannot mark the run {marker.name}: {in_words(error)}",
            where=str(marker),
            fix="make room; all that the run has saved is there",
        ) from error


def _missing(marker: Path) -> list[int]:
    lines = marker.read_text().splitlines() if marker.is_file() else []
    return [int(number) for line in lines if line.startswith(_MISSING) for number in re.findall(r"\d+", line)]

"""How a rank reports a failure: to the others through the job's store, on its own output, in the run's folder, and to
the `deca supervise` above its launcher."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deca_ds.errors import KILLED, LOOK_AT_THE_KILLED, ConnectionLostError
from deca_ds.printing import print_wrapped
from deca_ds.run_folder import DONE, FAILED, STOPPED

if TYPE_CHECKING:
    from torch.distributed import Store

_KEY, _LEAVES = "job/failed", "job/leaves"
EXIT_CODES = "DECA_EXIT_CODES"  # in the environment: the file for the exit codes of a host's ranks
_LOST = re.compile("Connection closed by peer|Connection reset by peer|Broken pipe|remote process exited")


def is_lost_connection(error: BaseException) -> bool:
    """Return whether `error` says that the process at the other end is gone; gloo's and NCCL's errors say so by their
    text."""
    by_text = isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None
    return by_text or isinstance(error, ConnectionLostError)


def lost_connection(error: BaseException, others: Sequence[tuple[str, str]]) -> str:
    """Explain a lost connection: which rank is gone, where and when, what to look at, and last the library's message.

    others: the ranks of which one is at the other end, each with its last known phase, empty if there is none.
    """
    seen = error.seen if isinstance(error, ConnectionLostError) else f"{type(error).__name__}: {error}"
    if len(others) == 1:
        gone = rank_is_gone(*others[0])
    else:
        lines = "".join(f"\n    {who}" + (f": {when}" if when else "") for who, when in others)
        gone = f"one of these ranks is gone: {KILLED}{lines}\n  fix:   {LOOK_AT_THE_KILLED}"
    return f"{gone}\n  seen:  {' '.join(seen.split())}"


def rank_is_gone(who: str, when: str, why: str = KILLED) -> str:
    """Say that a rank is gone. who, when: see `lost_connection`."""
    last = f", last seen in {when}" if when else ""
    return f"{who} is gone{last}: {why}\n  fix:   {LOOK_AT_THE_KILLED}"


@dataclass(frozen=True)
class Failure:
    """A rank's failure. rank, host: where. place: what the rank was doing, empty at the start. code: the exit code that
    it calls for."""

    rank: int
    host: str
    place: str
    message: str
    code: int

    @property
    def where(self) -> str:
        """Rank, host, and what the rank was doing."""
        return f"rank {self.rank} on {self.host}" + (f", {self.place}" if self.place else "")

    def report(self, store: Store) -> Failure:
        """Put this failure into the job's store; returns the first one there, which is the one that all ranks see."""
        return Failure(**json.loads(store.compare_set(_KEY, "", json.dumps(asdict(self)))))

    @staticmethod
    def reported(store: Store) -> Failure | None:
        """Return the failure in the job's store, if there is one."""
        return Failure(**json.loads(store.get(_KEY))) if store.check([_KEY]) else None

    def tell(self, *, of_client: int | None = None, alone: bool = False) -> None:
        """Print the failure. of_client: the client that ends, while the others continue. alone: whether there is one
        rank only."""
        ends = "" if of_client is None else f"client {of_client} ends, "
        print_wrapped(f"\nERROR: {'' if alone else f'{ends}{self.where}: '}{self.message}")

    def mark(self, output: Path | None, name: str, *, replaces: bool = False) -> None:
        """Write the failure to a file in the run's folder, if that exists; the file appears as a whole. name: FAILED,
        which gives way to the marker of a job that has come to its end (checkpoint/done.py), or the name for one
        client, without which the others may have finished. replaces: whether to replace the file if another rank has
        written it already."""
        if output is None or not output.is_dir() or (name == FAILED and _has_ended(output)):
            return
        marker, partial = output / name, output / f".{name}.{self.rank}.partial"
        with contextlib.suppress(OSError):  # on a full disk the marker is empty
            partial.write_text(f"{self.where}\n{self.message}\n", encoding="utf-8", errors="replace")
        with contextlib.suppress(OSError):  # another rank was first
            if replaces:
                os.replace(partial, marker)
            else:
                _link(partial, marker)
        with contextlib.suppress(OSError):
            partial.unlink()
        if name == FAILED and _has_ended(output):
            with contextlib.suppress(OSError):
                marker.unlink()


def note_leaving(rank: int, store: Store) -> None:
    """Note that `rank` knows why the job ends, and needs the job's store no more."""
    store.set(f"{_LEAVES}/{rank}", "")


def all_leave(ranks: Iterable[int], store: Store) -> bool:
    """Return whether all of `ranks` have noted that."""
    return store.check([f"{_LEAVES}/{rank}" for rank in ranks])


def _has_ended(output: Path) -> bool:
    return any((output / name).exists() for name in (DONE, STOPPED))


def _link(partial: Path, marker: Path) -> None:
    try:
        os.link(partial, marker)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        with open(marker, "xb") as file:
            file.write(partial.read_bytes())


def tell_exit_code(code: int) -> None:
    """Write this rank's exit code where `deca supervise` reads it, if it has asked: a launcher may end with another
    code, as torchrun does."""
    if path := os.environ.get(EXIT_CODES):
        with contextlib.suppress(OSError), open(path, "a", encoding="ascii") as codes:
            codes.write(f"{code}\n")


def told_exit_codes(path: Path) -> set[int]:
    """Return the exit codes that the ranks have written to `path`."""
    with contextlib.suppress(OSError):
        return {int(code) for code in path.read_text(encoding="ascii").split()}
    return set()

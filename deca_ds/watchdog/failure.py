"""What a rank tells of a failure: to the others through the job's store, on its own output, and in the run's folder."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

USER_ERROR_CODE, FAILURE_CODE = 2, 1
_KEY = "job/failed"


@dataclass(frozen=True)
class Failure:
    """rank, host: where. place: what the rank was at, empty at the start. code: the exit code that it calls for."""

    rank: int
    host: str
    place: str
    message: str
    code: int

    @property
    def where(self) -> str:
        """Rank, host, and what the rank was at."""
        return f"rank {self.rank} on {self.host}" + (f", {self.place}" if self.place else "")

    def report(self, store: Store) -> Failure:
        """Put it into the job's store; returns the first one there, which is the one that all hear of."""
        return Failure(**json.loads(store.compare_set(_KEY, "", json.dumps(asdict(self)))))

    @staticmethod
    def reported(store: Store) -> Failure | None:
        """The one in the job's store."""
        return Failure(**json.loads(store.get(_KEY))) if store.check([_KEY]) else None

    def tell(self, *, of_client: int | None = None, alone: bool = False) -> None:
        """Print it. of_client: the client that ends, while the others go on. alone: there is one rank only."""
        ends = "" if of_client is None else f"client {of_client} ends, "
        print(f"\nERROR: {'' if alone else f'{ends}{self.where}: '}{self.message}", file=sys.stderr, flush=True)

    def mark(self, output: Path | None, name: str) -> None:
        """Write it to a new file in the run's folder, if there is one already. name: FAILED, which is for a job that is
        not done, or a client's, which the others may have finished without."""
        if output is None or not output.is_dir() or (name == "FAILED" and (output / "DONE").exists()):
            return
        with contextlib.suppress(OSError), open(output / name, "x", encoding="utf-8", errors="replace") as marker:
            marker.write(f"{self.where}\n{self.message}\n")

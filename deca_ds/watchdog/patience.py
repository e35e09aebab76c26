"""How long a rank waits for others to react before it ends by itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Patience:
    """Seconds. cut_off_s: for a rank that has lost another one of its client to notice that the client is cut off.
    others_s: for the survivors to drop a client that hangs and to open another store, before the job ends. reacts_s:
    for a main thread to react to an early end."""

    cut_off_s: float = 5.0
    others_s: float = 60.0
    reacts_s: float = 5.0


USUAL = Patience()

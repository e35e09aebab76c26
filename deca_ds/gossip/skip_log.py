"""Who was late: counted for the metrics, and told when it begins and when it ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from deca_ds.printing import print_wrapped
from deca_ds.transport import Transport


class SkipLog:
    """A client's neighbours that its averagings were without.

    skipped: in the last averaging, on any of the client's ranks. times: neighbour -> averagings so far. reports:
    whether this rank tells it on stderr.
    """

    def __init__(self, transport: Transport, client_sum: Callable[[float], float], reports: bool = False):
        self.reports = reports
        self.skipped: list[int] = []
        self.times: Counter[int] = Counter()
        self._transport, self._client_sum = transport, client_sum
        self._away: Counter[int] = Counter()  # the same, since they were there for the last time

    def note(self, neighbours: Sequence[int], skipped: Mapping[int, bool]) -> None:
        """Note a settled averaging. All ranks of the client call this.

        skipped: neighbours that this rank averaged without, and whether they were late; if not, this client was.
        """
        self.skipped = []
        if self._client_sum(len(skipped)):
            self.skipped = [j for j in neighbours if self._client_sum(j in skipped)]
        for j in neighbours:
            if j in self.skipped:
                late = self._client_sum(skipped.get(j, False))
                if not self._away[j]:
                    self._tell(f"continues without client {j}, which is late" if late else f"is late for client {j}")
                self._away[j] += 1
                self.times[j] += 1
            elif self._away[j]:
                self._tell(f"averages with client {j} again, after {self._away.pop(j)} averagings without it")

    def _tell(self, what: str) -> None:
        if self.reports:
            step = self._transport.progress.step
            print_wrapped(f"client {self._transport.client}, inner step {step}: {what}")

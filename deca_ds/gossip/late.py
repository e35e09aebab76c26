"""Late neighbours: an averaging continues without an edge, and both of its ends decide so alike.

Leaving out the edge {i, j} for one averaging gives w_ij to w_ii and w_ji to w_jj. Where W is symmetric both are the
same number, so that rows and columns still sum to 1 and the mean of all clients stays. If one end alone did it, or if
W were not symmetric, the mean would move.

So each edge has one word per averaging and shard index in the job's store, which is written by compare-and-set: the
first end to write decides for both (EdgeDecision).

    taken      one end has all of the other's values: both average them, the other end's rest is on its way
    skipped    one end has waited long enough: both throw away what they have got of it

After a skipped averaging the edge rests, and carries nothing until both ends have met: the word of an averaging is then

    here       one end has come to it and waits for the other
    met        so has the other one: from the next averaging on the edge carries values again
    skipped    the one that was here has waited long enough

An averaging in which they meet is skipped, too. Each end knows the word before it continues to its next averaging, so
both always agree on whether the edge rests, and no message is sent that the other end does not expect.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping

import numpy as np
from torch.distributed import Store

from deca_ds.errors import ConfigError
from deca_ds.gossip.schedule import MixingSchedule

TAKEN, SKIPPED, HERE, MET = "taken", "skipped", "here", "met"
_LOOK_S = 0.02  # between two looks at what the other end may have written


def row_without(weights: Mapping[int, float], client: int, skipped: Collection[int]) -> dict[int, float]:
    """Return the row of W that is left without the `skipped` neighbours: j -> weight.

    weights: j -> w_ij, of `client` itself, too. The weight of skipped neighbours goes to the client itself.
    """
    row = {j: weight for j, weight in weights.items() if j not in skipped}
    row[client] = weights.get(client, 0.0) + sum(weights.get(j, 0.0) for j in skipped)
    return row


def check_wait(wait_s: float | None, mixing: MixingSchedule) -> None:
    """Raise ConfigError where gossip.wait_s is set and a matrix of `mixing` is not symmetric."""
    if wait_s is not None and not all(np.allclose(matrix, matrix.T, rtol=0, atol=1e-6) for matrix in mixing.matrices):
        raise ConfigError(
            f"gossip.wait_s = {wait_s:g}, but the mixing matrix is not symmetric ({mixing.name}): without an edge its "
            "columns would not sum to 1, and the mean of the clients would move",
            where="gossip.wait_s",
            fix="leave it out, or choose an undirected graph in gossip.graph or a symmetric gossip.matrix",
        )


class EdgeDecision:
    """The word of one edge in one averaging, as one of its ends sees it. It is used until it is taken, skipped or met.

    store: of the averaging's shard index, shared by both ends. The end that reads the other one's final word removes
    it, so that the store keeps words only while one end has not come to them.
    """

    def __init__(self, store: Store, t: int, client: int, neighbour: int):
        self._store, self._client = store, client
        self._key = f"{t}/{min(client, neighbour)}-{max(client, neighbour)}"
        self._seen = ""
        self._next_look = time.monotonic() + _LOOK_S

    @property
    def final(self) -> bool:
        """Whether it is decided, as far as this end knows."""
        return any(map(self.says, (TAKEN, SKIPPED, MET)))

    @property
    def blank(self) -> bool:
        """Whether nobody has written, as far as this end knows."""
        return not self._seen

    @property
    def mine(self) -> bool:
        """Whether this end has written what stands there."""
        return self._seen.endswith(f" {self._client}")

    def says(self, word: str) -> bool:
        """Return whether `word` stands in the store, as far as this end knows."""
        return self._seen.split(" ")[0] == word

    def write(self, word: str) -> None:
        """Replace the word that this end has seen by `word`; if the other end was faster, note what that one wrote."""
        self._see(self._store.compare_set(self._key, self._seen, f"{word} {self._client}"))

    def look(self) -> None:
        """Note what the other end may have written; asks the store only every _LOOK_S seconds."""
        if not self.final and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + _LOOK_S
            if self._store.check([self._key]):
                self._see(self._store.get(self._key))

    def _see(self, found: bytes) -> None:
        self._seen = found.decode()
        if self.final and not self.mine:
            self._store.delete_key(self._key)

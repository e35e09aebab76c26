"""How many elements ZeRO-3 has gathered at a time on a rank during the passes of one micro-batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# DeepSpeed's defaults
_PREFETCH, _REUSE, _LIVE = 50_000_000, 1_000_000_000, 1_000_000_000
_THREADS = 2  # of gloo, in torch: so many gathers run at a time


@dataclass(frozen=True)
class Gathered:
    """Numbers of elements. most: gathered at a time. arriving: the same if those that are arriving count twice. end:
    gathered in the last module of the backward pass."""

    most: int
    arriving: int
    end: int


def peak_gathered(
    calls: Sequence[Sequence[str]],
    sizes: Mapping[str, int],
    trained: Collection[str],
    zero: Mapping[str, Any],
    ranks: int,
) -> Gathered:
    """Compute what DeepSpeed's coordinator holds once it knows the order of the modules.

    calls: the parameters of every module, if it has any, in the order of the forward pass. sizes: elements by
    parameter. trained: the parameters of the active block, below which no backward pass goes. zero: DeepSpeed's section
    zero_optimization. ranks: of the client; a single rank fetches parameters from the host, one by one.

    The coordinator keeps a parameter if a module within the next stage3_max_reuse_distance elements uses it again. When
    a module runs, the coordinator gathers the next stage3_prefetch_bucket_size elements ahead, up to
    stage3_max_live_parameters in all. Parameters that it gathers together arrive in one piece, from which it copies
    them; the piece stays until modules have used all of them.
    """
    first = next((k for k, call in enumerate(calls) if not set(call).isdisjoint(trained)), len(calls))
    steps = [*calls, *reversed(calls[first:])]
    rank = _Rank(steps, sizes, zero, together=ranks > 1)
    held = []
    for place in range(len(steps)):
        held.append(rank.enter(place))
        rank.leave(place)
    return Gathered(max(held), rank.arriving, held[-1])


@dataclass(eq=False)
class _Gather:
    """A gather of one or several parameters. several: whether they arrive in one piece. awaited: the parameters that no
    module has used yet. arrived: whether a module has waited for it."""

    elements: int
    several: bool
    awaited: set[str]
    arrived: bool = False

    def use(self, names: set[str]) -> None:
        """Note that a module with these parameters runs."""
        self.arrived |= not self.awaited.isdisjoint(names)
        self.awaited -= names


class _Rank:
    """The gathered parameters of a rank. arriving: see Gathered."""

    def __init__(
        self, steps: Sequence[Sequence[str]], sizes: Mapping[str, int], zero: Mapping[str, Any], together: bool
    ):
        self._steps, self._sizes, self._together = steps, sizes, together
        self._reuse = _whole(zero.get("stage3_max_reuse_distance"), _REUSE)
        self._prefetch = _whole(zero.get("stage3_prefetch_bucket_size"), _PREFETCH)
        self._live = _whole(zero.get("stage3_max_live_parameters"), _LIVE)
        self._ahead = deque((name, place) for place, call in enumerate(steps) for name in call)
        self._there: set[str] = set()
        self._gathers: list[_Gather] = []  # those with awaited parameters
        self._wanted_for: dict[str, int] = {}  # the last step for which a parameter was gathered
        self.arriving = 0

    def enter(self, place: int) -> int:
        """Gather what this step needs, then gather ahead. Returns the most elements that the rank holds meanwhile."""
        call = set(self._steps[place])
        self._gather([name for name in self._steps[place] if name not in self._there])
        for gather in self._gathers:
            gather.use(call)
        most = self._held()
        self._gathers = [gather for gather in self._gathers if gather.awaited]
        new = {name for name in call if self._wanted_for.get(name, -1) < place}
        while new:
            name, at = self._ahead.popleft()
            self._wanted_for[name] = at
            new.discard(name)
        self._look_ahead()
        return max(most, self._held())

    def leave(self, place: int) -> None:
        """Release what this step used, unless a later step needs it soon."""
        released = {name for name in self._steps[place] if self._wanted_for[name] <= place}
        passed = 0
        for later in self._steps[place + 1 :]:
            if passed >= self._reuse or not released:
                break
            released.difference_update(later)
            passed += self._numel(later)
        self._there -= released

    def _look_ahead(self) -> None:
        room = min(self._live - self._numel(self._there), self._prefetch)
        chosen: list[str] = []
        while self._ahead and self._numel(chosen) < room:
            name, at = self._ahead.popleft()
            self._wanted_for[name] = max(self._wanted_for.get(name, -1), at)
            if name not in self._there and name not in chosen:
                chosen.append(name)
        self._gather(chosen)

    def _gather(self, names: Sequence[str]) -> None:
        if not names:
            return
        self._there.update(names)
        self._gathers.append(_Gather(self._numel(names), self._together and len(names) > 1, set(names)))
        arriving = [gather.elements for gather in self._gathers if not gather.arrived]
        self.arriving = max(self.arriving, self._held() + sum(arriving[-_THREADS:]))

    def _held(self) -> int:
        """Count the elements: a piece until all of it has been used, and the copies from it as well."""
        pieces = [gather for gather in self._gathers if gather.several]
        inside = {name for piece in pieces if not piece.arrived for name in piece.awaited}
        return self._numel(self._there - inside) + sum(piece.elements for piece in pieces)

    def _numel(self, names: Iterable[str]) -> int:
        return sum(self._sizes[name] for name in names)


def _whole(value: object, default: int) -> int:
    return int(value) if isinstance(value, int | float) else default  # else "auto"

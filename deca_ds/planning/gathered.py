"""How many elements ZeRO-3 has gathered at a time on a rank during the passes of one micro-batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# of DeepSpeed, where the user's JSON says nothing else
_PREFETCH, _REUSE, _LIVE = 50_000_000, 1_000_000_000, 1_000_000_000
_THREADS = 2  # of gloo, in torch: so many gathers are under way at a time


@dataclass(frozen=True)
class Gathered:
    """Elements. most: at a time. arriving: the most at a time where what is under way counts twice. end: in the last
    module of the backward pass."""

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
    """What DeepSpeed's coordinator holds once it knows the order of the modules.

    calls: the parameters of every module, if it has any, in the order of the forward pass. sizes: elements by
    parameter. trained: of the active block, below which no backward pass goes. zero: DeepSpeed's section
    zero_optimization. ranks: of the client; a single one brings parameters from the host, one by one.

    A parameter stays if a module within the next stage3_max_reuse_distance elements uses it again. Whenever a module
    runs, the next stage3_prefetch_bucket_size elements are gathered ahead, as long as no more than
    stage3_max_live_parameters are there. Parameters that are gathered together come in one piece and are copied out of
    it; the piece stays until all of them have been used.
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
    """Of parameters together. awaited: those that no module has used yet. arrived: a module has waited for it.

    Several parameters come in one piece.
    """

    elements: int
    several: bool
    awaited: set[str]
    arrived: bool = False

    def use(self, names: set[str]) -> None:
        """A module with these parameters runs."""
        self.arrived |= not self.awaited.isdisjoint(names)
        self.awaited -= names


class _Rank:
    """What is gathered on a rank. arriving: see Gathered."""

    def __init__(
        self, steps: Sequence[Sequence[str]], sizes: Mapping[str, int], zero: Mapping[str, Any], together: bool
    ):
        self._steps, self._sizes, self._together = steps, sizes, together
        self._reuse = _whole(zero.get("stage3_max_reuse_distance"), _REUSE)
        self._prefetch = _whole(zero.get("stage3_prefetch_bucket_size"), _PREFETCH)
        self._live = _whole(zero.get("stage3_max_live_parameters"), _LIVE)
        self._ahead = deque((name, place) for place, call in enumerate(steps) for name in call)
        self._there: set[str] = set()
        self._gathers: list[_Gather] = []  # with parameters that are awaited
        self._wanted_for: dict[str, int] = {}  # the last step for which a parameter is there already
        self.arriving = 0

    def enter(self, place: int) -> int:
        """Gather what this step needs, then ahead. Returns the elements that are held meanwhile."""
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
        """Release what this step used, unless a step to come wants it to stay."""
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
        under_way = [gather.elements for gather in self._gathers if not gather.arrived]
        self.arriving = max(self.arriving, self._held() + sum(under_way[-_THREADS:]))

    def _held(self) -> int:
        """A piece counts until all of it has been used, and what has been copied out of it as well."""
        pieces = [gather for gather in self._gathers if gather.several]
        inside = {name for piece in pieces if not piece.arrived for name in piece.awaited}
        return self._numel(self._there - inside) + sum(piece.elements for piece in pieces)

    def _numel(self, names: Iterable[str]) -> int:
        return sum(self._sizes[name] for name in names)


def _whole(value: object, default: int) -> int:
    return int(value) if isinstance(value, int | float) else default  # else "auto"

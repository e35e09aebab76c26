"""How fast a run goes, and so when it ends: each block has its own pace, and evaluations take their time, too."""

from __future__ import annotations

from collections import Counter, deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deca_ds.algorithm import Schedule

_MEMORY = 20  # steps, of which loss and speed are the mean


class Pace:
    """The pace of one rank. left: inner steps of each block that are still to come, by its index. evaluations: how many
    are still to come.

    While one thread notes, another one may ask: answers are computed from copies, which are made in one go.
    """

    def __init__(self, left: Counter[int], evaluations: int):
        self._left, self._evaluations = left, evaluations
        self._block_s: dict[int, tuple[float, int]] = {}  # mean seconds, steps
        self._evaluation_s = 0.0  # of the last one; evaluations before the first of them are not counted
        self._losses: deque[float] = deque(maxlen=_MEMORY)
        self._speeds: deque[tuple[int, float]] = deque(maxlen=_MEMORY)  # tokens, seconds

    def step(self, block: int, seconds: float, loss: float, tokens: int) -> None:
        """Note that an inner step of `block` is done. seconds: since the step before, with all that came between."""
        mean, steps = self._block_s.get(block, (0.0, 0))
        steps = min(steps + 1, _MEMORY)  # what is long ago counts little, as does a first step, which warms up
        self._block_s[block] = mean + (seconds - mean) / steps, steps
        self._left[block] -= 1
        self._losses.append(loss)
        self._speeds.append((tokens, seconds))

    def evaluated(self, seconds: float) -> None:
        """Note that an evaluation is done. seconds: how long it took."""
        self._evaluations, self._evaluation_s = max(0, self._evaluations - 1), seconds

    @property
    def loss(self) -> float | None:
        """Nats per target token, the mean of the last steps."""
        losses = list(self._losses)
        return sum(losses) / len(losses) if losses else None

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of this rank's client per second, over the last steps."""
        speeds = list(self._speeds)
        seconds = sum(seconds for _, seconds in speeds)
        return sum(tokens for tokens, _ in speeds) / seconds if seconds else None

    @property
    def left_s(self) -> float | None:
        """Seconds until the run's end; None before the first step. A block that has not been trained yet is taken to
        be as fast as the others are."""
        known = {block: mean for block, (mean, _) in dict(self._block_s).items()}
        if not known:
            return None
        other = sum(known.values()) / len(known)
        steps = sum(count * known.get(block, other) for block, count in dict(self._left).items())
        return steps + self._evaluations * self._evaluation_s


def pace_from(schedule: Schedule, done: int, every: int) -> Pace:
    """Make the pace of a run that has made `done` inner steps. every: see `evaluations_left`."""
    left: Counter[int] = Counter()
    length = schedule.activation_steps
    for first in range(done - done % length, len(schedule), length):
        left[schedule.step(first).block] += min(first + length, len(schedule)) - max(first, done)
    return Pace(left, evaluations_left(done, len(schedule), every))


def evaluates(done: int, steps: int, every: int) -> bool:
    """Return whether the models are scored after `done` of `steps` inner steps. every: evaluation.every."""
    return done in (0, steps) or (every > 0 and done % every == 0)


def evaluations_left(done: int, steps: int, every: int) -> int:
    """Return how many evaluations are to come, one after `done` inner steps included. every: evaluation.every."""
    between = range(every * max(1, -(-done // every)), steps, every) if every else ()
    return (done == 0) + len(between) + 1


def duration(seconds: float) -> str:
    """Write seconds for people: 0:07, 12:40, 3:05:00, 2 days 3 h."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} days {hours % 24} h"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

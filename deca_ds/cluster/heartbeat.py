"""What every rank is doing, told to all others, and from it the deadline of every wait.

A rank's main thread notes its phase (progress.py). The guard's watcher thread puts the note into the job's store and
into run.output/heartbeats every second. A rank that has not moved on for cluster.timeout_s ends the job, unless a rank
that it waits for has moved on since, or one that this one waits for, and so on. So nobody waits for ever, and nobody
gives up on a slow rank that is at work. Time is measured by each rank's own clock; only the ages that are shown compare
the clocks of hosts.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch.distributed import Store

from deca_ds.cluster.launch import Launch
from deca_ds.cluster.progress import EVERYBODY, Progress, place
from deca_ds.errors import StallError

FOLDER = "heartbeats"
PERIOD_S = 1.0  # between two heartbeats of a rank
SILENCE_S = 10.0  # a rank whose heartbeats stop for so long is gone, stopped or cut off
_LOOK_AFTER_S = 5.0  # a rank that has not moved on for so long watches those that it waits for
_LOOKS = 3  # at this rank's own standstill: a process that was stopped, and goes on, does not hang
_SHOWN = 8  # ranks in a message


@dataclass(frozen=True)
class Heartbeat:
    """One rank's note. idle_s: how long it had not moved on when it was taken. time: when that was, seconds since 1970
    by its host's clock; no two heartbeats of a rank have the same."""

    rank: int
    host: str
    client: int | None
    phase: str
    step: int
    block: str
    awaits: int | str | None
    idle_s: float
    time: float

    @property
    def doing(self) -> str:
        """Phase and who is awaited."""
        awaited = {None: "", EVERYBODY: ", waiting for everybody"}.get(self.awaits)
        return self.phase + (f", waiting for client {self.awaits}" if awaited is None else awaited)

    def age_s(self) -> float:
        """Seconds since the rank moved on, by this host's clock."""
        return max(0.0, time.time() - self.time) + self.idle_s

    def silent_s(self) -> float:
        """Seconds since the last heartbeat, by this host's clock."""
        return max(0.0, time.time() - self.time)

    def __str__(self) -> str:
        silence = f", no sign of life for {self.silent_s():.0f} s" if self.silent_s() > SILENCE_S else ""
        client = "" if self.client is None else f" (client {self.client})"
        doing = place(self.doing, self.step, self.block)
        return f"rank {self.rank} on {self.host}{client}: {doing}, {self.age_s():.0f} s ago{silence}"


@dataclass
class _Observed:
    """What this rank has seen of another one, by its own clock: the last heartbeat, when it came, and when the rank had
    last moved on then."""

    heartbeat: Heartbeat
    came: float
    moved: float


@dataclass
class Heartbeats:
    """This rank's heartbeat, and what it sees of the others'. `beat` and `stalled` belong to the watcher thread.

    folder: run.output/heartbeats, once it may be written to. gone: ranks that are not there, while the others go on.
    """

    launch: Launch
    progress: Progress = field(default_factory=Progress)
    folder: Path | None = None
    gone: frozenset[int] = frozenset()
    _due: float = 0.0
    _observed: dict[int, _Observed] = field(default_factory=dict)
    _looks: int = 0

    def own(self) -> Heartbeat:
        """This rank's heartbeat now."""
        now = self.progress
        client = None if now.layout is None else now.layout.client_of(self.launch.rank)
        idle = max(0.0, time.monotonic() - now.moved)
        who = (self.launch.rank, self.launch.host, client)
        return Heartbeat(*who, now.phase, now.step, now.block, now.awaits, round(idle, 3), time.time())

    def beat(self, store: Store, *, last: bool = False) -> bool:
        """Tell where this rank stands, if it is time to. last: now, in the file alone, because the job ends."""
        if not last and time.monotonic() < self._due:
            return False
        self._due = time.monotonic() + PERIOD_S
        text = json.dumps(asdict(self.own()))
        if not last:
            store.set(_key(self.launch.rank), text)
        if self.folder is not None:
            with suppress(OSError):  # a full disk is for those to report who need it
                self.folder.mkdir(parents=True, exist_ok=True)
                partial = self.folder / f".rank_{self.launch.rank:04d}.partial"
                partial.write_text(text + "\n")
                os.replace(partial, self.folder / f"rank_{self.launch.rank:04d}.json")
        return True

    def stalled(self, store: Store, *, own: bool = False) -> StallError | None:
        """Why the job has to end, if this rank has waited too long. See the module's text. own: also if others have
        waited too long for this rank, which itself waits for nobody."""
        progress, now = self.progress, time.monotonic()
        timeout_s, moved = progress.timeout_s, progress.moved
        if timeout_s is None or now - moved < min(_LOOK_AFTER_S, timeout_s / 4):
            self._observed.clear()  # what has been seen is of another wait
            self._looks = 0
            return None
        awaited = self._awaited(store, now)
        if not awaited:  # at work of its own
            return self._hanging(store, now) if own and now - moved >= timeout_s else None
        seen = [self._observed[rank].moved for rank in awaited if rank in self._observed]
        idle_s = now - max([*seen, moved])
        if idle_s < timeout_s:
            return None
        direct = self._culprits(awaited)
        stall = StallError(
            f"no progress for {now - moved:.0f} s; this rank waits for {direct}. Last seen:\n"
            + "\n".join(f"    {line}" for line in self._lines(awaited)),
            where=progress.place,
            fix=f"look at the output of {direct}; if they are only slow, raise cluster.timeout_s",
        )
        layout = progress.layout
        stall.clients = frozenset(None if layout is None else layout.client_of(rank) for rank in awaited)
        stall.idle_s = idle_s
        return stall

    def _hanging(self, store: Store, now: float) -> StallError | None:
        progress, own = self.progress, self.launch.rank
        for rank in set(range(self.launch.world_size)) - self.gone - {own}:
            other = self._observe(rank, store, now)
            if other is None or now - other.moved < (progress.timeout_s or 0.0) or other.heartbeat.awaits is None:
                continue
            if own in self._named(rank, other.heartbeat.awaits):
                self._looks += 1
                if self._looks < _LOOKS:
                    return None
                stall = StallError(
                    f"no progress for {now - progress.moved:.0f} s; {other.heartbeat} waits for it",
                    where=progress.place,
                    fix="look at what this rank's main thread does; if it is only slow, raise cluster.timeout_s",
                )
                stall.clients, stall.idle_s = frozenset({self.own().client}), now - progress.moved
                return stall
        return None

    def last_seen(self, store: Store) -> str:
        """For a message: where the ranks are that this rank has to do with, a line each; empty if it is alone."""
        look = Heartbeats(
            self.launch, self.progress, gone=self.gone
        )  # what has been observed belongs to the watcher thread
        lines = "".join(f"\n    {line}" for line in look._lines(look._awaited(store, time.monotonic())))
        return f"\n  last seen:{lines}" if lines else ""

    def _awaited(self, store: Store, now: float) -> list[int]:
        """The ranks that this one waits for, nearest first: those that it has named, and those that these wait for."""
        own = self.launch.rank
        found: dict[int, None] = {}
        at_hand = list(self._named(own, self.progress.awaits))
        while at_hand:
            rank = at_hand.pop(0)
            if rank == own or rank in found or rank in self.gone:
                continue
            found[rank] = None
            observed = self._observe(rank, store, now)
            # who keeps silent waits for nobody
            if observed is not None and now - observed.came < SILENCE_S:
                at_hand += self._named(rank, observed.heartbeat.awaits)
        return list(found)

    def _named(self, rank: int, awaits: int | str | None) -> Iterator[int]:
        layout = self.progress.layout
        if layout is None or awaits == EVERYBODY:
            yield from range(self.launch.world_size)
            return
        if isinstance(awaits, int):
            yield from layout.partners(rank, awaits)
        yield from layout.ranks_of(layout.client_of(rank))

    def _observe(self, rank: int, store: Store, now: float) -> _Observed | None:
        if store.check([_key(rank)]):
            heartbeat = Heartbeat(**json.loads(store.get(_key(rank))))
            before = self._observed.get(rank)
            if before is None or before.heartbeat.time != heartbeat.time:
                self._observed[rank] = _Observed(heartbeat, now, now - heartbeat.idle_s)
        return self._observed.get(rank)

    def _lines(self, ranks: list[int]) -> list[str]:
        oldest = sorted(ranks, key=lambda rank: -self._age(rank))
        more = [f"and {len(oldest) - _SHOWN} more ranks"] if len(oldest) > _SHOWN else []
        return [self._line(rank) for rank in oldest[:_SHOWN]] + more

    def _line(self, rank: int) -> str:
        observed = self._observed.get(rank)
        return str(observed.heartbeat) if observed is not None else f"rank {rank}: never"

    def _age(self, rank: int) -> float:
        observed = self._observed.get(rank)
        return observed.heartbeat.age_s() if observed is not None else float("inf")

    def _culprits(self, awaited: list[int]) -> str:
        """The awaited ranks that are not where this one is: those that keep silent if there are any."""
        progress = self.progress
        silent, elsewhere = [], []
        for rank in awaited:
            observed = self._observed.get(rank)
            if observed is None or observed.heartbeat.silent_s() > SILENCE_S:
                silent.append(rank)
            elif (observed.heartbeat.phase, observed.heartbeat.step) != (progress.phase, progress.step):
                elsewhere.append(rank)
        named = silent or elsewhere or awaited
        hosts = {rank: self._observed[rank].heartbeat.host for rank in named if rank in self._observed}
        shown = [f"rank {rank}" + (f" on {hosts[rank]}" if rank in hosts else "") for rank in named[:_SHOWN]]
        return ", ".join(shown) + (f" and {len(named) - _SHOWN} more" if len(named) > _SHOWN else "")


def _key(rank: int) -> str:
    return f"heartbeat/{rank}"


def read_heartbeats(folder: Path) -> list[Heartbeat]:
    """The heartbeats in a run's folder, ascending by rank; those of ranks that write on this host's disks."""
    return [Heartbeat(**json.loads(path.read_text())) for path in sorted((folder / FOLDER).glob("rank_*.json"))]

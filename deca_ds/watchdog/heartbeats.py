"""Heartbeats: every rank publishes what it is doing, and every wait gets its deadline from these notes.

A rank's main thread notes its phase (progress.py). The guard's watcher thread writes the note to the job's store and to
run.output/heartbeats every second; in a phase of work it looks for signs of work (signs.py), which count as progress. A
rank without progress for cluster.timeout_s ends the job, unless a rank that it waits for has made progress since, or
one that this rank waits for, and so on. So no rank waits for ever, and none gives up on a slow rank that is working.
Each rank measures time by its own clock; only the ages in messages compare the clocks of hosts.

The rank that hosts the store reads all heartbeats and tells each stalled rank how much patience it needs (survey.py),
so that each rank costs the store a fixed number of reads and writes. A rank reads the heartbeats of others itself only
for an error message, or while the host is silent.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from deca_ds.errors import CheckpointError, StallError, in_words
from deca_ds.launch import Launch
from deca_ds.launch.progress import EVERYBODY, SHARED, Progress, place
from deca_ds.plural import first_few
from deca_ds.run_folder import BEAT, HEARTBEATS, numbered
from deca_ds.watchdog.signs import Signs

if TYPE_CHECKING:
    from torch.distributed import Store

PERIOD_S = 1.0  # between two heartbeats of a rank
SILENCE_S = 10.0  # a rank whose heartbeats stop for so long is gone, stopped or cut off
_LOOK_AFTER_S = 5.0
_LOOKS = 3  # so often in a row this rank has to find itself stalled
_SHOWN = 8  # ranks in a message


@dataclass(frozen=True)
class Heartbeat:
    """One rank's note. idle_s: seconds since the rank's last progress, at the time of the note. time: of the note, in
    seconds since 1970 by its host's clock; no two heartbeats of a rank have the same. outlived: whether the others
    continue without this rank's client if it fails, so that it may come back."""

    rank: int
    host: str
    client: int | None
    phase: str
    step: int
    block: str
    awaits: int | str | None
    idle_s: float
    time: float
    outlived: bool = False

    @property
    def doing(self) -> str:
        """The phase, and whom the rank waits for."""
        known: dict[int | str | None, str] = {None: "", SHARED: "", EVERYBODY: ", waiting for everybody"}
        awaited = known.get(self.awaits)
        return self.phase + (f", waiting for client {self.awaits}" if awaited is None else awaited)

    def age_s(self) -> float:
        """Return the seconds since the rank's last progress, by this host's clock."""
        return max(0.0, time.time() - self.time) + self.idle_s

    def silent_s(self) -> float:
        """Return the seconds since the last heartbeat, by this host's clock."""
        return max(0.0, time.time() - self.time)

    @property
    def who(self) -> str:
        """Rank, host and client."""
        return f"rank {self.rank} on {self.host}" + ("" if self.client is None else f" (client {self.client})")

    @property
    def when(self) -> str:
        """Phase, step and block, and how long ago."""
        silence = f", no sign of life for {self.silent_s():.0f} s" if self.silent_s() > SILENCE_S else ""
        return f"{place(self.doing, self.step, self.block)}, {self.age_s():.0f} s ago{silence}"

    def __str__(self) -> str:
        return f"{self.who}: {self.when}"


@dataclass
class Sighting:
    """What a rank has seen of another one, by its own clock: the last heartbeat, when it came, and the time of the
    other rank's last progress before it."""

    heartbeat: Heartbeat
    came: float
    moved: float

    def silent(self, now: float) -> bool:
        """Return whether heartbeats have stopped: nobody has patience for the sake of ranks that a silent one waits
        for."""
        return now - self.came >= SILENCE_S


class Sightings(dict[int, Sighting]):
    """What this rank has seen of others, by rank; belongs to one thread."""

    def look(self, ranks: Sequence[int], store: Store, now: float) -> None:
        """Read the heartbeats of `ranks`, as far as there are any."""
        keys = {rank: f"heartbeat/{rank}" for rank in ranks}
        if not store.check(list(keys.values())):  # to read a missing key would wait for it
            keys = {rank: key for rank, key in keys.items() if store.check([key])}
        for rank, text in zip(keys, store.multi_get(list(keys.values())) if keys else (), strict=True):
            heartbeat, before = Heartbeat(**json.loads(text)), self.get(rank)
            if before is None or before.heartbeat.time != heartbeat.time:
                self[rank] = Sighting(heartbeat, now, now - heartbeat.idle_s)

    def lines(self, ranks: Sequence[int]) -> list[str]:
        """Say where the ranks are, a line each, those with the latest progress last."""
        oldest = sorted(ranks, key=lambda rank: -self[rank].heartbeat.age_s() if rank in self else float("-inf"))
        more = [f"and {len(oldest) - _SHOWN} more ranks"] if len(oldest) > _SHOWN else []
        shown = [str(self[rank].heartbeat) if rank in self else f"rank {rank}: never" for rank in oldest[:_SHOWN]]
        return shown + more


@dataclass
class Heartbeats:
    """This rank's heartbeat, and what it sees of the others'. `beat` and `stalled` belong to the watcher thread,
    `write_to` and `let_others_go_on` to the main thread; both threads write the file.

    ranks: gives the ranks that are in the job now.
    """

    launch: Launch
    ranks: Callable[[], Sequence[int]]
    progress: Progress = field(default_factory=Progress)
    signs: Signs = field(default_factory=Signs)
    _folder: Path | None = None
    _outlived: bool = False
    _writing: threading.Lock = field(default_factory=threading.Lock)
    _due: float = 0.0
    _seen: Sightings = field(default_factory=Sightings)
    _told: tuple[bytes, float] = (b"", 0.0)  # the last message of the store's host to this rank, and when it came
    _looks: int = 0

    def write_to(self, folder: Path) -> None:
        """Write heartbeats to `folder`, run.output/heartbeats, too, from now on: the first one at once, so that nobody
        finds a run without any."""
        self._folder = folder
        self._write()

    def let_others_go_on(self) -> None:
        """Say in this and all later heartbeats that the others continue without this rank's client. The file says so
        when this returns: `deca supervise` starts a rank again that dies a moment later."""
        self._outlived = True
        self._write()

    def own(self) -> Heartbeat:
        """Return this rank's heartbeat now."""
        now = self.progress
        idle = max(0.0, time.monotonic() - now.moved)
        who = (self.launch.rank, self.launch.host, self._client(self.launch.rank))
        return Heartbeat(*who, now.phase, now.step, now.block, now.awaits, round(idle, 3), time.time(), self._outlived)

    def beat(self, store: Store, *, last: bool = False) -> bool:
        """Publish this rank's heartbeat, if one is due. last: write it now, to the file alone, because the job ends."""
        if not last and time.monotonic() < self._due:
            return False
        self._due = time.monotonic() + PERIOD_S
        if self.signs.seen() and self.progress.at_work:
            self.progress.tick()
        if not last:
            store.set(f"heartbeat/{self.launch.rank}", json.dumps(asdict(self.own())))
        self._write()
        return True

    def _write(self) -> None:
        """Write this rank's heartbeat now to its file, if there is a folder for it."""
        if self._folder is None:
            return
        # the part of the job that needs the disk reports that it is full
        with self._writing, suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / BEAT.format(self.launch.rank)
            partial = path.with_name(f".{path.name}.partial")
            partial.write_text(json.dumps(asdict(self.own())) + "\n")
            os.replace(partial, path)

    def stalled(self, store: Store, *, own: bool = False) -> StallError | None:
        """Return why the job has to end, if this rank has waited too long (see the module's text). own: also if others
        have waited too long for this rank, which itself waits for nobody."""
        progress, now = self.progress, time.monotonic()
        timeout_s, moved = progress.timeout_s, progress.moved
        if timeout_s is None or now - moved < look_after_s(timeout_s):
            self._seen.clear()  # it belongs to another wait
            self._told, self._looks = (b"", 0.0), 0
            return None
        idle_s = self._told_idle_s(store, now, timeout_s)
        if idle_s is not None and idle_s < timeout_s:
            return None
        awaited = self._awaited(self._seen, store, now)
        if not awaited and not progress.at_work:
            return self._hanging(store, now) if own and now - moved >= timeout_s else None
        if idle_s is None:
            idle_s = now - max([moved, *(self._seen[rank].moved for rank in awaited if rank in self._seen)])
        if idle_s < timeout_s or (progress.at_work and not self._is_sure()):
            return None
        return self._stall(awaited, now - moved, idle_s)

    def _stall(self, awaited: list[int], own_s: float, idle_s: float) -> StallError:
        """Make the error. own_s: seconds since this rank's last progress. idle_s: seconds since the last progress of
        this rank and of all that it waits for."""
        progress, seen = self.progress, self._seen
        clients = {self._client(rank) for rank in awaited or [self.launch.rank]}
        silent = [rank for rank in awaited if rank not in seen or seen[rank].heartbeat.silent_s() > SILENCE_S]
        last = "".join(f"\n    {line}" for line in seen.lines(awaited))
        if progress.at_work and not silent:
            return StallError(
                f"no progress for {own_s:.0f} s, and no sign of work: this rank takes no CPU time and no memory, and "
                f"reads and writes nothing{'; nor do those that it may wait for. Last seen:' * bool(last)}{last}",
                where=progress.place,
                fix="look at what its main thread does, and at the disks and the network that it uses",
                clients=clients,
                idle_s=idle_s,
            )
        here = (progress.phase, progress.step)
        elsewhere = [r for r in awaited if r in seen and (seen[r].heartbeat.phase, seen[r].heartbeat.step) != here]
        direct = self._names(silent or elsewhere or awaited, seen)
        return StallError(
            f"no progress for {own_s:.0f} s; this rank waits for {direct}. Last seen:{last}",
            where=progress.place,
            fix=f"look at the output of {direct}; if they are only slow, raise cluster.timeout_s",
            clients=clients,
            idle_s=idle_s,
        )

    def _is_sure(self) -> bool:
        """Return whether this rank has found itself stalled several times in a row: a process that was stopped for a
        while does not hang."""
        self._looks += 1
        return self._looks >= _LOOKS

    def _told_idle_s(self, store: Store, now: float, timeout_s: float) -> float | None:
        """Return the seconds since the last progress of this rank and of those that it waits for, as the store's host
        says (survey.py); None while the host is silent."""
        key, (before, came) = told_key(self.launch.rank), self._told
        text = store.get(key) if store.check([key]) else b""
        if text != before or not came:
            came = now
        self._told = text, came
        if now - came >= min(SILENCE_S, timeout_s / 4):
            return None
        told = json.loads(text)[0] if text else 0.0
        return min(told + now - came, now - self.progress.moved)  # the message may belong to an earlier stall

    def _hanging(self, store: Store, now: float) -> StallError | None:
        progress, own = self.progress, self.launch.rank
        others = set(self.ranks()) - {own}
        self._seen.look(sorted(others), store, now)
        for rank in others & self._seen.keys():
            other = self._seen[rank]
            awaits = other.heartbeat.awaits
            if now - other.moved < (progress.timeout_s or 0.0) or awaits in (None, SHARED):
                continue
            if own in self._named(rank, awaits):
                if not self._is_sure():
                    return None
                return StallError(
                    f"no progress for {now - progress.moved:.0f} s; {other.heartbeat} waits for it",
                    where=progress.place,
                    fix="look at what this rank's main thread does; if it is only slow, raise cluster.timeout_s",
                    clients={self._client(own)},
                    idle_s=now - progress.moved,
                )
        return None

    def other_end(self, store: Store | None, rank: int | None = None) -> list[tuple[str, str]]:
        """Describe for a message `rank` or, without one, the ranks that this one waits for directly: which rank it is,
        and its last known phase. `store` is None if it is gone; then the files in the run's folder may say it."""
        own, there = self.launch.rank, frozenset(self.ranks())
        awaited = [rank for rank in self._named(own, self.progress.awaits) if rank in there and rank != own]
        ranks = list(dict.fromkeys(awaited))[:_SHOWN] if rank is None else [rank]
        known, seen = dict[int, Heartbeat](), Sightings()  # as in last_seen
        if self._folder is not None:
            with suppress(CheckpointError, OSError):
                known = {heartbeat.rank: heartbeat for heartbeat in read_heartbeats(self._folder.parent)}
        if store is not None:
            with suppress(RuntimeError):  # it is gone
                seen.look(ranks, store, time.monotonic())
        known |= {rank: sighting.heartbeat for rank, sighting in seen.items()}
        return [(known[rank].who, known[rank].when) if rank in known else (f"rank {rank}", "") for rank in ranks]

    def last_seen(self, store: Store) -> str:
        """Say where the ranks are that this rank waits for, a line each; empty if it is alone."""
        seen = Sightings()  # those of this object belong to the watcher thread
        lines = "".join(f"\n    {line}" for line in seen.lines(self._awaited(seen, store, time.monotonic())))
        return f"\n  last seen:{lines}" if lines else ""

    def _awaited(self, seen: Sightings, store: Store, now: float) -> list[int]:
        """Return the ranks that this one waits for, nearest first: directly, and through others."""
        own, there = self.launch.rank, frozenset(self.ranks())
        found: dict[int, None] = {}
        waits, share = [(own, self.progress.awaits)], False
        while waits:
            if not share and any(awaits == SHARED for _, awaits in waits):
                share = True
                seen.look(sorted(there), store, now)
                waits += [(rank, SHARED) for rank in seen if seen[rank].heartbeat.awaits == SHARED]
            named = dict.fromkeys(named for rank, awaits in waits for named in self._named(rank, awaits))
            new = [rank for rank in named if rank in there and rank != own and rank not in found]
            if new:
                seen.look(new, store, now)
            found |= dict.fromkeys(new)
            waits = [(r, seen[r].heartbeat.awaits) for r in new if r in seen and not seen[r].silent(now)]
        return list(found)

    def _named(self, rank: int, awaits: int | str | None) -> Iterator[int]:
        """Yield the ranks that `rank` waits for directly in this wait, without those that share what it waits for."""
        layout = self.progress.layout
        if layout is None or awaits == EVERYBODY:
            yield from range(self.launch.world_size)
            return
        if isinstance(awaits, int):
            yield from layout.partners(rank, awaits)
        yield from layout.ranks_of(layout.client_of(rank))

    def _client(self, rank: int) -> int | None:
        return None if self.progress.layout is None else self.progress.layout.client_of(rank)

    def _names(self, ranks: list[int], seen: Sightings) -> str:
        hosts = {rank: seen[rank].heartbeat.host for rank in ranks if rank in seen}
        return first_few((f"rank {rank}" + (f" on {hosts[rank]}" if rank in hosts else "") for rank in ranks), _SHOWN)


def look_after_s(timeout_s: float) -> float:
    """Return after how many seconds without progress a rank asks how much patience it needs."""
    return min(_LOOK_AFTER_S, timeout_s / 4)


def told_key(rank: int) -> str:
    """Return the key under which the store's host tells `rank` its patience: JSON, [seconds, when]."""
    return f"standstill/{rank}"


def read_heartbeats(folder: Path) -> list[Heartbeat]:
    """Read the heartbeats in a run's folder, ascending by rank: those of ranks whose folder is on this host's disks.
    Raises CheckpointError for one that cannot be read."""
    return [_read(path) for path in numbered(folder / HEARTBEATS, BEAT).values()]


def _read(path: Path) -> Heartbeat:
    try:
        return Heartbeat(**json.loads(path.read_text()))
    except OSError as error:
        raise CheckpointError(
            f"cannot read a heartbeat: {in_words(error)}", where=str(path), fix="make the folder readable"
        ) from error
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            "this is no heartbeat of this version of deca_ds",
            where=str(path),
            fix="use the version that the run was started with, or remove the file: a rank that lives writes it again",
        ) from error

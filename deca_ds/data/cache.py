"""Prepared data on the disk, found again by what they were made of: entries that are whole, or not there.

An entry is a folder of Arrow files with entry.json: the size and the checksum of each file, and what its maker has
noted. Its name follows the code, too (code.py). It is made under another name and then renamed, so that nobody ever
sees half of it, and looked through before it is used: what is damaged is made again. A lock keeps two processes from
making the same entry at a time; where the file system has none, both make it, and one of them is kept.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import datasets
import xxhash
from datasets import Dataset

from deca_ds.config.paths import check_writable
from deca_ds.data.code import CODE
from deca_ds.errors import ConfigError, in_words
from deca_ds.printing import print_wrapped

NOTE = "entry.json"
_READ_BYTES = 2**22
_LOOK_S = 0.1  # between two looks at a lock
_TELL_S = 10.0  # until a wait for another process is told
MAKING = ".making-"  # in the names of folders that are being made, or removed
_LEFT_S = 24 * 3600.0  # after which what a process was making is taken for left behind


@dataclass(frozen=True)
class Entry:
    """One entry. about: what its maker has noted, as JSON reads it."""

    folder: Path
    about: dict[str, Any]

    def table(self, name: str) -> Dataset | None:
        """Return the rows of NAME.arrow, memory-mapped; None if there are none."""
        path = self.folder / f"{name}.arrow"
        rows = Dataset.from_file(str(path)) if path.exists() else None
        return rows if rows is not None and len(rows) else None

    @classmethod
    def read(cls, folder: Path) -> Entry:
        """Read an entry that has been looked through."""
        text = (folder / NOTE).read_text(encoding="utf-8")
        return cls(folder, json.loads(text.splitlines()[0])["about"])


class Cache:
    """Entries below a folder: data.cache, or where it is None a folder in the cache of the datasets library.

    If that one cannot be written to, entries are made in a temporary folder, `temporary`, until `close`. tick: called
    while files are read, and while another process is seen to make the entry that is wanted.
    Raises ConfigError if data.cache cannot be written to, and wherever there is no room for an entry.
    """

    def __init__(self, given: str | None = None, tick: Callable[[], None] = lambda: None):
        self.given, self.tick = given, tick
        self.folder = folder_of(given)
        self.temporary: Path | None = None
        self._known: dict[tuple[Path, int, int], str] = {}
        self._found: dict[str, Entry] = {}

    def entry(self, kind: str, parts: Any, make: Callable[[Path], dict[str, Any]]) -> Entry:
        """Return the entry of this kind that this code makes of `parts`, JSON-able.

        make: write its files into a folder, beside which there is room for others; returns what to note. It is called
        only if there is no such entry.
        """
        name = f"{kind}-{_hash(json.dumps([CODE, parts]))}"
        if name not in self._found:
            self._found[name] = self._whole(self.folder / name) or self._made(self._writable() / name, make)
        return self._found[name]

    def content(self, path: Path) -> str:
        """Return the `fingerprint` of a file that is read, once for each cache. Raises OSError."""
        state = path.stat()
        known = path.absolute(), state.st_size, state.st_mtime_ns
        if known not in self._known:
            self._known[known] = fingerprint(path, self.tick)
        return self._known[known]

    def close(self) -> None:
        """Remove what is temporary. Files that are memory-mapped can be read on."""
        if self.temporary is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)
            self.temporary = None

    def _made(self, target: Path, make: Callable[[Path], dict[str, Any]]) -> Entry:
        with self._locked(target):
            found = self._whole(target)
            if found is None:
                self._make(target, make)
                found = self._whole(target)
        if found is None:
            raise ConfigError(
                f"what has just been written to {str(target)!r} cannot be read again",
                where="data.cache",
                fix="name a folder on another disk",
            )
        return found

    def _whole(self, folder: Path) -> Entry | None:
        """Return the entry if it exists and is as it was made, else None."""
        if not folder.is_dir():
            return None
        try:
            text, _, checksum = (folder / NOTE).read_text(encoding="utf-8").rstrip("\n").rpartition("\n")
            if _hash(text) == checksum:
                note = json.loads(text)
                if all(fingerprint(folder / name, self.tick) == is_ for name, is_ in note["files"].items()):
                    with contextlib.suppress(OSError):  # another user's, or a disk that is only read
                        os.utime(folder / NOTE)  # when it was last used
                    return Entry(folder, note["about"])
        except (OSError, ValueError):
            pass
        return None

    def _make(self, target: Path, make: Callable[[Path], dict[str, Any]]) -> None:
        for path in target.parent.glob(f".*{MAKING}*"):
            if time.time() - _newest(path) > _LEFT_S:
                shutil.rmtree(path, ignore_errors=True)
        try:
            with tempfile.TemporaryDirectory(
                prefix=f".{target.name}{MAKING}", dir=target.parent, ignore_cleanup_errors=True
            ) as made:
                with contextlib.suppress(FileNotFoundError):
                    os.rename(target, Path(made) / "damaged")
                    _tell(f"the prepared data in {target} are damaged, and made again")
                new = Path(made) / "entry"
                new.mkdir()
                about = make(new)
                files = {path.name: fingerprint(path, self.tick) for path in sorted(new.iterdir())}
                text = json.dumps({"files": files, "about": about})
                (new / NOTE).write_text(f"{text}\n{_hash(text)}\n", encoding="utf-8")
                try:
                    os.rename(new, target)
                except OSError:
                    if not target.is_dir():  # else another process has made it at the same time
                        raise
        except OSError as error:
            raise ConfigError(
                f"cannot prepare data in {str(target.parent)!r}: {in_words(error)}",
                where="data.cache" if self.given else "HF_DATASETS_CACHE, or data.cache",
                fix="name a folder in data.cache that has room and that this process may write to",
            ) from error

    def _writable(self) -> Path:
        """Return a folder in which entries can be made: the cache, or a temporary one if that cannot be written to."""
        if self.temporary is not None:
            return self.temporary
        try:
            check_writable(self.folder, "data.cache")
            self.folder.mkdir(parents=True, exist_ok=True)
        except ConfigError as error:
            if self.given:
                raise
            self.temporary = Path(tempfile.mkdtemp(prefix="deca_ds-"))
            _tell(f"{error.what}; data are prepared in {self.temporary}, for this run alone, unless data.cache is set")
        return self.temporary or self.folder

    @contextlib.contextmanager
    def _locked(self, target: Path) -> Iterator[None]:
        """Keep other processes from making the entry meanwhile, if the file system has locks."""
        lock = target.with_name(f".{target.name}.lock")
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # a file system without locks, or the lock of another user
                self._wait_for(stack.enter_context(open(lock, "w")), target)
                stack.callback(lock.unlink, missing_ok=True)  # who waits finds the entry, or makes it beside another
            yield

    def _wait_for(self, lock: IO[str], target: Path) -> None:
        tells_at, before = time.monotonic() + _TELL_S, -1.0
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                pass
            newest = max(map(_newest, target.parent.glob(f".{target.name}{MAKING}*")), default=before)
            if newest > before:
                before = newest
                self.tick()
            if time.monotonic() > tells_at:
                _tell(f"another process prepares {target}; this one waits for it")
                tells_at = float("inf")
            time.sleep(_LOOK_S)


def folder_of(given: str | None) -> Path:
    """Return the folder of the entries. given: data.cache."""
    return Path(given or Path(datasets.config.HF_DATASETS_CACHE) / "deca_ds").absolute()


def fingerprint(path: Path, tick: Callable[[], None] = lambda: None) -> str:
    """Return the fingerprint of a file's content: its size and XXH3 hash of 128 bits. Raises OSError. tick: called
    every 4 MiB."""
    hashed, size, part = xxhash.xxh3_128(), 0, memoryview(bytearray(_READ_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(part):
            hashed.update(part[:count])
            size += count
            tick()
    return f"{size}-{hashed.hexdigest()}"


def _hash(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode())


def _newest(folder: Path) -> float:
    """Return when a file in `folder` was last written to, in seconds; now, if a file goes meanwhile."""
    try:
        return max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
    except OSError:
        return time.time()


def _tell(what: str) -> None:
    print_wrapped(f"NOTE: {what}")

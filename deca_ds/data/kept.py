"""What lies in a folder of prepared data (cache.py): how large it is, when it was last used, and how it is removed."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from deca_ds.data.cache import MAKING, NOTE
from deca_ds.errors import ConfigError, in_words


@dataclass(frozen=True)
class Kept:
    """An entry. kind: what was prepared. used: when it was made or used, in seconds since 1970."""

    folder: Path
    kind: str
    bytes: int
    used: float

    def remove(self) -> None:
        """Remove the entry: a job that has mapped it into memory continues, and nobody finds half of it. Raises
        ConfigError."""
        try:
            gone = tempfile.mkdtemp(prefix=f".{self.folder.name}{MAKING}", dir=self.folder.parent)
            os.rename(self.folder, Path(gone) / "removed")
            shutil.rmtree(gone)
        except OSError as error:
            raise ConfigError(
                f"cannot remove {str(self.folder)!r}: {in_words(error)}",
                where="data.cache",
                fix="look at the permissions of the cache's folder",
            ) from error


def kept(folder: Path) -> list[Kept]:
    """Return the whole entries in a folder; those used last come last."""
    found = []
    for note in folder.glob(f"[!.]*/{NOTE}"):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            size = sum(path.stat().st_size for path in note.parent.iterdir())
            found.append(Kept(note.parent, note.parent.name.partition("-")[0], size, note.stat().st_mtime))
    return sorted(found, key=lambda entry: entry.used)

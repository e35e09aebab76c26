"""A few characters that tell one content from another: digests, and versions of packages.

Standard library alone: `deca doctor` sends it to hosts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_DIGEST_BYTES = 8


def digest(parts: Iterable[bytes | memoryview]) -> str:
    """Return the digest of one content, given part after part."""
    total = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for part in parts:
        total.update(len(part).to_bytes(8, "little"))
        total.update(part)
    return total.hexdigest()


def code_digest(root: Path) -> str:
    """Return the digest of the source files of the package in this folder."""
    files = sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix())
    return digest(part for path in files for part in (path.relative_to(root).as_posix().encode(), path.read_bytes()))


def version_of(package: str) -> str:
    """Return the version of an installed package; "" if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""

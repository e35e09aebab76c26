"""Which code prepares data: what other code has made may hold other tokens, so it is not taken from the cache."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import xxhash
from datasets.fingerprint import Hasher

# those that read rows, draw which ones, write conversations and make tokens; the last three for some tokenizers only
_LIBRARIES = (
    "pyarrow",
    "datasets",
    "numpy",
    "jinja2",
    "transformers",
    "tokenizers",
    "sentencepiece",
    "tiktoken",
    "mistral-common",
)


def digest_of(root: Path) -> str:
    """Return a digest of the source files in this folder and below."""
    files = sorted(root.rglob("*.py"))
    content = [(str(file.relative_to(root)), file.read_bytes()) for file in files]
    return xxhash.xxh3_128_hexdigest(repr(content).encode())


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


# As the modules are imported: what a file becomes while a process runs is not what that process runs.
SOURCES = digest_of(Path(__file__).parent)
CODE = {"data": SOURCES, "python": platform.python_version(), **{name: _version(name) for name in _LIBRARIES}}


def code_of(thing: Any) -> list[str]:
    """Return what tells the code of a function, or of a class, that may be somebody else's: its name and the content of
    the file that defines it, but not of what that imports; or what it is made of where it has no file, as in a
    notebook."""
    file = getattr(sys.modules.get(thing.__module__), "__file__", None)
    if file is None:
        return [Hasher.hash(thing)]
    return [thing.__module__, thing.__qualname__, xxhash.xxh3_128_hexdigest(Path(file).read_bytes())]

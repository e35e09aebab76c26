"""Writing sharded state: every rank writes its own slices, and its folder appears at once, complete.

    <folder>/client_003/rank_001/manifest.json             who wrote it, and where each slice lies
    <folder>/client_003/rank_001/manifest.blake2b          the manifest's checksum
    <folder>/client_003/rank_001/000_embeddings.safetensors   one file for each group of slices

A slice is [start, stop) of the row-major flat parameter, as ZeRO-3 cuts it, and may be empty. A rank's folder appears
by one rename once it is complete, so a folder that exists is whole unless something damaged it later. Until then it is
its name with .partial, into which links.py may have linked files that need not be written again.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from deca_ds.checkpoint.files import checksum, sync
from deca_ds.checkpoint.part import PARTIAL, Part
from deca_ds.checkpoint.tensor_files import save_file
from deca_ds.engine.slices import Slice
from deca_ds.errors import CheckpointError, in_words

VERSION = 1
MANIFEST, MANIFEST_CHECKSUM = "manifest.json", "manifest.blake2b"


def file_name(index: int, label: str) -> str:
    """Return the name of the file of the group of slices number `index`."""
    return f"{index:03d}_{re.sub('[^A-Za-z0-9]+', '-', label).strip('-')}.safetensors"


@dataclass(frozen=True)
class LinkedFile:
    """A file that lies in a rank's unfinished folder already. entry, tensors: what the manifest says about it."""

    entry: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, Any]]


def begin_part(folder: Path, part: Part) -> Path:
    """Make the unfinished folder of a part, empty, and return it. Raises OSError if that cannot be."""
    target = part.folder(folder)
    partial = target.with_name(target.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)  # what a killed process left
    partial.mkdir(parents=True)
    return partial


def save_shards(
    folder: Path,
    groups: Iterable[tuple[str, Iterable[Slice]]],
    part: Part,
    *,
    clients: int,
    step: int,
    state: Mapping[str, Any] | None = None,
    linked: Mapping[str, LinkedFile] | None = None,
) -> Path:
    """Write one rank's slices and return its folder. No communication; one group at a time is on the host.

    groups: (label, slices) pairs, consumed lazily. Every rank passes the same names, empty slices included.
    clients: of the run. step: inner steps done. state: what else this rank wants to find again, JSON-able; it goes into
    the manifest. linked: by name, the files that `link_files` has put there: their groups are not looked at.
    Raises CheckpointError if the folder exists or cannot be written; what was written of it is taken away again then.
    """
    target = part.folder(folder)
    if target.exists():
        raise CheckpointError("this rank's model is saved already", where=str(target), fix="write to a new folder")
    partial = target.with_name(target.name + PARTIAL)
    try:
        if not linked:
            begin_part(folder, part)
        manifest: dict[str, Any] = {"version": VERSION, "client": part.client, "clients": clients, "rank": part.rank}
        manifest |= {"ranks": part.ranks, "step": step, "state": dict(state or {}), "tensors": {}, "files": {}}
        for index, (label, slices) in enumerate(groups):
            name = file_name(index, label)
            if linked and name in linked:
                manifest["tensors"] |= linked[name].tensors
                manifest["files"][name] = linked[name].entry
            else:
                _write_group(partial / name, slices, manifest)
        (partial / MANIFEST).write_text(json.dumps(manifest))
        (partial / MANIFEST_CHECKSUM).write_text(checksum(partial / MANIFEST))
        for name in (MANIFEST, MANIFEST_CHECKSUM, ""):
            sync(partial / name)
        partial.rename(target)
        for changed in (target.parent, folder, folder.parent):
            sync(changed)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"cannot save the model: {in_words(error, named=True)}",
            where=str(target),
            fix="check the disk's free space and permissions",
        ) from error
    return target


def _write_group(path: Path, slices: Iterable[Slice], manifest: dict[str, Any]) -> None:
    tensors: dict[str, Tensor] = {}
    for piece in slices:
        if piece.values.shape != (piece.stop - piece.start,):
            raise ValueError(f"{piece.name}: [{piece.start}, {piece.stop}) does not fit {tuple(piece.values.shape)}")
        if piece.name in manifest["tensors"]:
            raise ValueError(f"{piece.name} is given twice")
        stored = piece.stored()
        manifest["tensors"][piece.name] = {
            "shape": list(piece.shape),
            "dtype": str(stored.dtype).removeprefix("torch."),
            "model_dtype": str(piece.model_dtype or piece.values.dtype).removeprefix("torch."),
            "start": piece.start,
            "stop": piece.stop,
            "file": path.name,
        }
        tensors[piece.name] = stored.contiguous()
    save_file(tensors, path)
    sync(path)
    manifest["files"][path.name] = {"bytes": path.stat().st_size, "blake2b": checksum(path)}

"""Files that a checkpoint takes over from an earlier one, as they are: hard links to what is on the disk already.

A file that two checkpoints share is there once, until the last of them is removed; damage to it is damage to both.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from deca_ds.checkpoint.part import Part
from deca_ds.checkpoint.shards import ShardedModel
from deca_ds.checkpoint.write_shards import LinkedFile, begin_part
from deca_ds.errors import CheckpointError


@dataclass(frozen=True)
class Links:
    """What could be linked, by the file's name. refused: why a file could not be, by the file system."""

    files: dict[str, LinkedFile] = field(default_factory=dict)
    refused: OSError | None = None


def link_files(folder: Path, base: Path, names: Collection[str], part: Part) -> Links:
    """Begin the part in `folder` with links to those files of it in `base` that are called `names`.

    The manifest in `base` has to have its checksum, all files in it their sizes, and the client as many ranks: else
    nothing is linked. Whatever is not linked has to be written. Reads manifests only.
    """
    files: dict[str, LinkedFile] = {}
    refused = None
    try:
        manifest = ShardedModel(base, [part.client], [part.rank]).manifests[part.client, part.rank]
        if manifest["ranks"] != part.ranks:
            return Links()
        partial = begin_part(folder, part)
    except (CheckpointError, OSError):
        return Links()
    for name in (name for name in names if name in manifest["files"]):
        try:
            os.link(part.folder(base) / name, partial / name)
        except OSError as error:
            refused = error
            continue
        tensors = {key: entry for key, entry in manifest["tensors"].items() if entry["file"] == name}
        files[name] = LinkedFile(manifest["files"][name], tensors)
    return Links(files, refused)

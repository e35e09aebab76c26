"""Sharded model state: every rank writes its own slices, one process reads them back parameter by parameter.

    <folder>/client_003/rank_001/manifest.json             who wrote it, and where each slice lies
    <folder>/client_003/rank_001/000_embeddings.safetensors   one file for each group of slices

A slice is [start, stop) of the row-major flat parameter, as ZeRO-3 cuts it, and may be empty. A rank's folder appears
by one rename once it is complete, so a folder that exists is whole unless something damaged it later.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from deca_ds.checkpoint.files import checksum, sync
from deca_ds.errors import CheckpointError

VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Slice:
    """Elements [start, stop) of the flat parameter (or persistent buffer) `name`, whose full shape is `shape`.

    values: 1-D, stop - start elements, on any device, of the data type to be stored.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    values: Tensor


def rank_folder(folder: Path, client: int, rank: int) -> Path:
    """Where `rank` of `client` keeps its slices."""
    return folder / f"client_{client:03d}" / f"rank_{rank:03d}"


def save_shards(
    folder: Path,
    groups: Iterable[tuple[str, Iterable[Slice]]],
    *,
    client: int,
    clients: int,
    rank: int,
    ranks: int,
    step: int,
) -> Path:
    """Write one rank's slices and return its folder. No communication; one group at a time is on the host.

    groups: (label, slices) pairs, consumed lazily. Every rank passes the same names, empty slices included.
    clients, ranks: the run's number of clients and this client's number of ranks. step: inner steps done.
    Raises CheckpointError if the folder exists or cannot be written.
    """
    target = rank_folder(folder, client, rank)
    if target.exists():
        raise CheckpointError("this rank's model is saved already", where=str(target), fix="write to a new folder")
    partial = target.with_name(target.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # what a killed process left
        partial.mkdir(parents=True)
        manifest = {"version": VERSION, "client": client, "clients": clients, "rank": rank, "ranks": ranks}
        manifest |= {"step": step, "tensors": {}, "files": {}}
        for index, (label, slices) in enumerate(groups):
            name = f"{index:03d}_{re.sub('[^A-Za-z0-9]+', '-', label).strip('-')}.safetensors"
            _write_group(partial / name, slices, manifest)
        (partial / MANIFEST).write_text(json.dumps(manifest))
        sync(partial / MANIFEST)
        sync(partial)
        partial.rename(target)
        sync(target.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot save the model: {error}", where=str(target), fix="check the disk's free space and permissions"
        ) from error
    return target


def _write_group(path: Path, slices: Iterable[Slice], manifest: dict[str, Any]) -> None:
    tensors: dict[str, Tensor] = {}
    for piece in slices:
        if piece.values.shape != (piece.stop - piece.start,):
            raise ValueError(f"{piece.name}: [{piece.start}, {piece.stop}) does not fit {tuple(piece.values.shape)}")
        if piece.name in manifest["tensors"]:
            raise ValueError(f"{piece.name} is given twice")
        manifest["tensors"][piece.name] = {
            "shape": list(piece.shape),
            "dtype": str(piece.values.dtype).removeprefix("torch."),
            "start": piece.start,
            "stop": piece.stop,
            "file": path.name,
        }
        tensors[piece.name] = piece.values.detach().to("cpu").contiguous()
    save_file(tensors, path)
    sync(path)
    manifest["files"][path.name] = {"bytes": path.stat().st_size, "blake2b": checksum(path)}


class ShardedModel:
    """A saved model, read lazily: opening looks at manifests and file sizes, reading at one parameter at a time.

    clients: numbers of the clients that will be read; None: all clients of the run. Only their files must be here.
    A file's checksum is compared when the file is first read.
    Attributes: clients (numbers, ascending), clients_of_run, step, names (in the order they were written).
    Raises CheckpointError for a missing folder, client or rank, a file of the wrong size, slices that overlap or leave
    a gap, and clients that differ in names, shapes, data types or step.
    """

    def __init__(self, folder: Path, clients: Sequence[int] | None = None):
        self.folder = folder
        manifests = self._read_manifests()
        first = next(iter(manifests.values()))
        self.clients_of_run: int = first["clients"]
        self.step: int = first["step"]
        self.clients = list(range(self.clients_of_run)) if clients is None else sorted(clients)
        for client in self.clients:
            if not 0 <= client < self.clients_of_run:
                raise CheckpointError(
                    f"there is no client {client}", where=str(folder), fix=f"0 to {self.clients_of_run - 1} exist"
                )
        wanted = {key: manifest for key, manifest in manifests.items() if key[0] in self.clients}
        self._refuse_missing(wanted)
        for (client, rank), manifest in wanted.items():
            if (manifest["clients"], manifest["step"]) != (self.clients_of_run, self.step):
                raise CheckpointError(
                    f"client {client} rank {rank} was saved at step {manifest['step']} of a run with "
                    f"{manifest['clients']} clients, others at step {self.step} with {self.clients_of_run}",
                    where=str(rank_folder(folder, client, rank)),
                    fix="bring together the files of one run only",
                )
        self._files = {
            rank_folder(folder, *key) / name: entry
            for key, manifest in wanted.items()
            for name, entry in manifest["files"].items()
        }
        self._intact: set[Path] = set()
        self._refuse_wrong_sizes()
        self._meta, self._slices = self._index(wanted)

    @property
    def names(self) -> list[str]:
        return list(self._meta)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._meta[name][0]

    def dtype(self, name: str) -> torch.dtype:
        return self._meta[name][1]

    def read(self, name: str, client: int) -> Tensor:
        """The full parameter of one client, on the CPU, in the stored data type."""
        flat = torch.empty(prod(self.shape(name)), dtype=self.dtype(name))
        for start, stop, values in self._read_slices(name, client):
            flat[start:stop] = values
        return flat.view(self.shape(name))

    def mean(self, name: str) -> Tensor:
        """Mean over `clients`, added up in float32 in ascending order of the clients; stored data type."""
        total = torch.zeros(prod(self.shape(name)), dtype=torch.float32)
        for client in self.clients:
            for start, stop, values in self._read_slices(name, client):
                total[start:stop] += values
        return total.div_(len(self.clients)).to(self.dtype(name)).view(self.shape(name))

    def _read_slices(self, name: str, client: int) -> Iterator[tuple[int, int, Tensor]]:
        for start, stop, path in self._slices[name, client]:
            self._refuse_damaged(path)
            with safe_open(path, framework="pt") as file:
                yield start, stop, file.get_tensor(name)

    def _read_manifests(self) -> dict[tuple[int, int], dict[str, Any]]:
        manifests = {}
        for path in sorted(self.folder.glob(f"client_*/rank_*/{MANIFEST}")):
            if path.parent.suffix == ".partial":
                continue
            try:
                manifest = json.loads(path.read_text())
                version, key = manifest["version"], (manifest["client"], manifest["rank"])
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(
                    f"damaged manifest: {error}", where=str(path), fix="copy the folder again from the host it is from"
                ) from error
            if version != VERSION:
                raise CheckpointError(
                    f"format version {version}, known here: {VERSION}",
                    where=str(path),
                    fix="use the version of deca_ds that saved it",
                )
            if rank_folder(self.folder, *key) != path.parent:
                raise CheckpointError(
                    f"this folder holds client {key[0]} rank {key[1]}",
                    where=str(path.parent),
                    fix=f"it belongs in {rank_folder(self.folder, *key)}",
                )
            manifests[key] = manifest
        if not manifests:
            raise CheckpointError(
                "no saved model here",
                where=str(self.folder),
                fix="give the output folder of a run that has finished; on several hosts, one that holds its files",
            )
        return manifests

    def _refuse_missing(self, manifests: dict[tuple[int, int], dict[str, Any]]) -> None:
        ranks = {client: manifest["ranks"] for (client, _), manifest in manifests.items()}
        absent = []
        for client in self.clients:
            if client not in ranks:
                absent.append(f"client {client}")
            else:
                absent += [f"client {client} rank {r}" for r in range(ranks[client]) if (client, r) not in manifests]
        if absent:
            raise CheckpointError(
                f"the saved model is incomplete; missing: {', '.join(absent)}",
                where=str(self.folder),
                fix="copy client_*/rank_* from the other hosts of the run into this folder",
            )

    def _refuse_wrong_sizes(self) -> None:
        for path, entry in self._files.items():
            size = path.stat().st_size if path.is_file() else None
            if size != entry["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes"
                raise CheckpointError(
                    f"{path.name} {found}, {entry['bytes']} were written",
                    where=str(path),
                    fix="copy it again from the host that wrote it",
                )

    def _refuse_damaged(self, path: Path) -> None:
        if path in self._intact:
            return
        if checksum(path) != self._files[path]["blake2b"]:
            raise CheckpointError(
                f"{path.name} is damaged: its checksum is not the one it was written with",
                where=str(path),
                fix="copy it again from the host that wrote it",
            )
        self._intact.add(path)

    def _index(self, manifests: dict[tuple[int, int], dict[str, Any]]) -> tuple[dict, dict]:
        """(name -> shape and data type, (name, client) -> slices in ascending order) after all consistency checks."""
        meta: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        slices: dict[tuple[str, int], list[tuple[int, int, Path]]] = {}
        for (client, rank), manifest in sorted(manifests.items()):
            where = rank_folder(self.folder, client, rank)
            for name, entry in manifest["tensors"].items():
                described = (tuple(entry["shape"]), getattr(torch, entry["dtype"]))
                if meta.setdefault(name, described) != described:
                    raise CheckpointError(
                        f"{name} is {_describe(described)} in client {client} rank {rank}, "
                        f"{_describe(meta[name])} elsewhere",
                        where=str(where),
                        fix="bring together the files of one run only",
                    )
                held = slices.setdefault((name, client), [])
                if entry["start"] < entry["stop"]:
                    held.append((entry["start"], entry["stop"], where / entry["file"]))
        for client in self.clients:
            for name, (shape, _) in meta.items():
                held = slices.setdefault((name, client), [])
                held.sort()
                self._refuse_gaps(name, client, [(start, stop) for start, stop, _ in held], prod(shape))
        return meta, slices

    def _refuse_gaps(self, name: str, client: int, intervals: list[tuple[int, int]], numel: int) -> None:
        covered = 0
        for start, stop in [*intervals, (numel, numel)]:
            if start != covered:
                low, high = sorted((start, covered))
                found = "are held twice" if start < covered else "are missing"
                raise CheckpointError(
                    f"client {client}, {name}: elements [{low}, {high}) of {numel} {found}",
                    where=str(self.folder),
                    fix="bring together the files of one run only",
                )
            covered = stop


def _describe(described: tuple[tuple[int, ...], torch.dtype]) -> str:
    return f"{tuple(described[0])} {str(described[1]).removeprefix('torch.')}"

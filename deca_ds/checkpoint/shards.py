"""Reading sharded state back, parameter by parameter or slice by slice; write_shards.py says what was written.

The reader's ranks need not be the writer's: a slice is put together from whatever slices it intersects.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from deca_ds.checkpoint.files import checksum
from deca_ds.checkpoint.part import rank_folder, rank_folders
from deca_ds.checkpoint.write_shards import MANIFEST, MANIFEST_CHECKSUM, VERSION
from deca_ds.engine.slices import is_buffer
from deca_ds.errors import CheckpointError

_Described = tuple[tuple[int, ...], torch.dtype, torch.dtype]  # shape, data type stored, and that of the model
_Slices = dict[tuple[str, int], list[tuple[int, int, Path]]]


class ShardedModel:
    """A saved model, read lazily: opening looks at manifests and file sizes, reading at one parameter at a time.

    clients: numbers of the clients that will be read; None: all clients of the run. Only their files must be here.
    without: clients that all of the run are meant without, because they died.
    ranks: numbers of the ranks whose slices will be read; None: all of a client's, which then leave no gap.
    model_only: leave out what a checkpoint has beside the model, the active block's state.
    A file's checksum is compared when the file is first read.
    Attributes: clients (numbers, ascending), clients_of_run, ranks (how many wrote, by client), step, names (in the
    order they were written), manifests (of each (client, rank)), states (what it gave to `save_shards` as its state).
    Raises CheckpointError for a missing folder, client or rank, a file of the wrong size, slices that overlap or leave
    a gap, and clients that differ in names, shapes, data types or step.
    """

    def __init__(
        self,
        folder: Path,
        clients: Sequence[int] | None = None,
        ranks: Sequence[int] | None = None,
        *,
        without: Sequence[int] = (),
        model_only: bool = False,
    ):
        self.folder = folder
        self._model_only = model_only
        manifests = self._read_manifests(clients, ranks)
        first = next(iter(manifests.values()))
        self.clients_of_run: int = first["clients"]
        self.step: int = first["step"]
        everybody = [client for client in range(self.clients_of_run) if client not in without]
        self.clients = everybody if clients is None else sorted(clients)
        self.manifests = {key: manifest for key, manifest in manifests.items() if key[0] in self.clients}
        self.ranks = {client: manifest["ranks"] for (client, _), manifest in self.manifests.items()}
        self.states = {key: manifest.get("state", {}) for key, manifest in self.manifests.items()}
        self._refuse_unknown_clients()
        self._refuse_missing(ranks)
        self._refuse_other_runs()
        self._files = {
            rank_folder(folder, *key) / name: entry
            for key, manifest in self.manifests.items()
            for name, entry in manifest["files"].items()
        }
        self._intact: set[Path] = set()
        self._refuse_wrong_sizes()
        self._meta, self._slices = self._index()
        if ranks is None:
            for name, client in self._slices:
                self._refuse_gaps(name, client, 0, prod(self.shape(name)))

    @property
    def names(self) -> list[str]:
        return list(self._meta)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the whole parameter."""
        return self._meta[name][0]

    def dtype(self, name: str) -> torch.dtype:
        """Return the data type of what is stored: float32 for masters."""
        return self._meta[name][1]

    def model_dtype(self, name: str) -> torch.dtype:
        """Return the data type of the parameter in the model that was trained."""
        return self._meta[name][2]

    def read(self, name: str, client: int) -> Tensor:
        """Read the full parameter of one client, on the CPU, in the stored data type."""
        return self.read_range(name, client, 0, prod(self.shape(name))).view(self.shape(name))

    def read_range(self, name: str, client: int, start: int, stop: int) -> Tensor:
        """Read elements [start, stop) of one client's flat parameter, on the CPU, in the stored data type.

        Reads nothing else. Raises CheckpointError if `ranks` hold only a part of them.
        """
        self._refuse_gaps(name, client, start, stop)
        values = torch.empty(stop - start, dtype=self.dtype(name))
        for low, high, part in self._read_slices(name, client, start, stop):
            values[low - start : high - start] = part
        return values

    def mean(self, name: str) -> Tensor:
        """Return the mean over `clients` in the stored data type; it is added up in float32, in ascending order of the
        clients."""
        total = torch.zeros(prod(self.shape(name)), dtype=torch.float32)
        for client in self.clients:
            for start, stop, values in self._read_slices(name, client, 0, total.numel()):
                total[start:stop] += values
        return total.div_(len(self.clients)).to(self.dtype(name)).view(self.shape(name))

    def verify(self) -> None:
        """Compare the checksums of all files. Raises CheckpointError for the first one that is damaged."""
        for path in self._files:
            self._refuse_damaged(path)

    def _read_slices(self, name: str, client: int, start: int, stop: int) -> Iterator[tuple[int, int, Tensor]]:
        """Yield what the slices hold of [start, stop), ascending: (first, last-plus-one, values)."""
        for low, high, path in self._slices[name, client]:
            first, last = max(low, start), min(high, stop)
            if first < last:
                self._refuse_damaged(path)
                with safe_open(path, framework="pt") as file:
                    yield first, last, file.get_slice(name)[first - low : last - low]

    def _read_manifests(
        self, clients: Sequence[int] | None, ranks: Sequence[int] | None
    ) -> dict[tuple[int, int], dict[str, Any]]:
        if clients is None or ranks is None:
            folders = rank_folders(self.folder)
        else:
            folders = [rank_folder(self.folder, client, rank) for client in clients for rank in ranks]
        manifests = {}
        for path in (folder / MANIFEST for folder in sorted(folders)):
            if path.is_file():
                manifest = self._read_manifest(path)
                manifests[manifest["client"], manifest["rank"]] = manifest
        if not manifests:
            raise CheckpointError(
                "no saved model here",
                where=str(self.folder),
                fix="give the output folder of a run that has finished; on several hosts, one that holds its files",
            )
        return manifests

    def _read_manifest(self, path: Path) -> dict[str, Any]:
        """Read one rank's manifest. Raises CheckpointError where it is damaged, of another version, or of another
        rank than its folder."""
        sums = path.with_name(MANIFEST_CHECKSUM)
        try:
            if sums.is_file() and sums.read_text() != checksum(path):
                raise ValueError("its checksum is not the one it was written with")
            manifest: dict[str, Any] = json.loads(path.read_text())
            version, client, rank = manifest["version"], manifest["client"], manifest["rank"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"damaged manifest: {f'it lacks {error}' if isinstance(error, KeyError) else error}",
                where=str(path),
                fix="copy the folder again from the host it is from",
            ) from error
        if version != VERSION:
            raise CheckpointError(
                f"format version {version}, known here: {VERSION}",
                where=str(path),
                fix="use the version of deca_ds that saved it",
            )
        if rank_folder(self.folder, client, rank) != path.parent:
            raise CheckpointError(
                f"this folder holds client {client} rank {rank}",
                where=str(path.parent),
                fix=f"it belongs in {rank_folder(self.folder, client, rank)}",
            )
        return manifest

    def _refuse_unknown_clients(self) -> None:
        for client in self.clients:
            if not 0 <= client < self.clients_of_run:
                raise CheckpointError(
                    f"there is no client {client}", where=str(self.folder), fix=f"0 to {self.clients_of_run - 1} exist"
                )

    def _refuse_missing(self, only: Sequence[int] | None) -> None:
        """Raise CheckpointError where the manifest of a client, or of one of its ranks, is missing. only: these ranks;
        None: all."""
        absent = []
        for client in self.clients:
            if client not in self.ranks:
                absent.append(f"client {client}")
            else:
                wanted = range(self.ranks[client]) if only is None else only
                absent += [f"client {client} rank {r}" for r in wanted if (client, r) not in self.manifests]
        if absent:
            raise CheckpointError(
                f"the saved model is incomplete; missing: {', '.join(absent)}",
                where=str(self.folder),
                fix="copy client_*/rank_* from the other hosts of the run into this folder",
            )

    def _refuse_other_runs(self) -> None:
        for (client, rank), manifest in self.manifests.items():
            if (manifest["clients"], manifest["step"]) != (self.clients_of_run, self.step):
                raise CheckpointError(
                    f"client {client} rank {rank} was saved at step {manifest['step']} of a run with "
                    f"{manifest['clients']} clients, others at step {self.step} with {self.clients_of_run}",
                    where=str(rank_folder(self.folder, client, rank)),
                    fix="bring together the files of one run only",
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

    def _index(self) -> tuple[dict[str, _Described], _Slices]:
        """Check consistency; return name -> shape and data type, and (name, client) -> slices in ascending order."""
        meta: dict[str, _Described] = {}
        slices: _Slices = {}
        for (client, rank), manifest in sorted(self.manifests.items()):
            where = rank_folder(self.folder, client, rank)
            for name, entry in manifest["tensors"].items():
                if self._model_only and is_buffer(name):
                    continue
                stored, trained = (getattr(torch, entry.get(key, entry["dtype"])) for key in ("dtype", "model_dtype"))
                described = (tuple(entry["shape"]), stored, trained)
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
            for name in meta:
                slices.setdefault((name, client), []).sort()
        return meta, slices

    def _refuse_gaps(self, name: str, client: int, start: int, stop: int) -> None:
        """Raise CheckpointError unless every element of [start, stop) is held, and once."""
        covered = start
        intervals = [(max(low, start), min(high, stop)) for low, high, _ in self._slices[name, client]]
        for first, last in [*((low, high) for low, high in intervals if low < high), (stop, stop)]:
            if first != covered:
                low, high = sorted((first, covered))
                found = "are held twice" if first < covered else "are missing"
                raise CheckpointError(
                    f"client {client}, {name}: elements [{low}, {high}) of {prod(self.shape(name))} {found}",
                    where=str(self.folder),
                    fix="bring together the files of one run only",
                )
            covered = last


def _describe(described: _Described) -> str:
    shape, stored, trained = described
    masters = f" of {trained}" if trained != stored else ""
    return f"{shape} {stored}{masters}".replace("torch.", "")

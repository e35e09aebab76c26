"""Which weights of a saved run have adapters, and the saved model with these merged: W + scale B A."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from deca_ds.checkpoint.shards import ShardedModel
from deca_ds.engine.adapters import Adapter
from deca_ds.errors import CheckpointError
from deca_ds.run_folder import ADAPTERS


def save_adapters(run: Path, adapters: Sequence[Adapter]) -> None:
    """Write `ADAPTERS` into the run's output folder: names and scales, no values."""
    (run / ADAPTERS).write_text(json.dumps([asdict(adapter) for adapter in adapters], indent=1) + "\n")


def read_adapters(run: Path) -> tuple[Adapter, ...]:
    """Read the adapters of a run; none where it has no `ADAPTERS`. Raises CheckpointError for a damaged one."""
    path = run / ADAPTERS
    if not path.is_file():
        return ()
    try:
        return tuple(Adapter(**entry) for entry in json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"damaged list of adapters: {error}", where=str(path), fix="copy it again from the host of the run's rank 0"
        ) from error


class MergedModel:
    """Reads a saved model with its adapters merged: the names of the model without adapters, and full weights.

    It stands in for a ShardedModel. A weight is merged when it is read, in float32, so that one weight and its adapter
    are in memory. Raises CheckpointError where `saved` lacks what `adapters` names, or holds it in another shape.
    """

    def __init__(self, saved: ShardedModel, adapters: Sequence[Adapter]):
        self.folder, self.clients = saved.folder, saved.clients
        self._saved = saved
        self._adapters = {adapter.weight: adapter for adapter in adapters}
        self._stored: Mapping[str, str] = {name: held for a in adapters for name, held in a.renamed.items()}
        for adapter in adapters:
            self._refuse_misfit(adapter)

    @property
    def names(self) -> list[str]:
        under = {held: name for name, held in self._stored.items()}
        inside = {name for adapter in self._adapters.values() for name in (adapter.a, adapter.b)}
        return [under.get(name, name) for name in self._saved.names if name not in inside]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._saved.shape(self._stored.get(name, name))

    def dtype(self, name: str) -> torch.dtype:
        """Return the data type that the weight is stored in; a merged one is read as float32 all the same."""
        return self._saved.dtype(self._stored.get(name, name))

    def model_dtype(self, name: str) -> torch.dtype:
        """Return the data type of the weight in the model that was trained."""
        return self._saved.model_dtype(self._stored.get(name, name))

    def read(self, name: str, client: int) -> Tensor:
        """Return one client's weight: W + scale B A."""
        return self._merge(name, lambda held: self._saved.read(held, client))

    def mean(self, name: str) -> Tensor:
        """Return the mean model's weight: W + scale mean(B) mean(A), as in training, where A and B are averaged apart.

        It is not the mean of the clients' merged weights.
        """
        return self._merge(name, self._saved.mean)

    def _merge(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        weight = read(self._stored.get(name, name))
        adapter = self._adapters.get(name)
        if adapter is None:
            return weight
        a, b = read(adapter.a).float(), read(adapter.b).float()
        left, right = (a.T, b.T) if adapter.transposed else (b, a)
        return weight.float().addmm_(left, right, alpha=adapter.scale)

    def _refuse_misfit(self, adapter: Adapter) -> None:
        held = set(self._saved.names)
        missing = [name for name in (adapter.a, adapter.b, *adapter.renamed.values()) if name not in held]
        if missing or adapter.weight not in adapter.renamed:
            found = f"the saved model has no {missing[0]}" if missing else f"{ADAPTERS} leaves out {adapter.weight}"
        else:
            weight, a, b = (self._saved.shape(name) for name in (adapter.renamed[adapter.weight], adapter.a, adapter.b))
            if adapter.transposed:
                weight = weight[::-1]
            if (b[0], a[1]) == weight and a[0] == b[1]:
                return
            found = f"the adapter of {adapter.weight} {weight} has shapes {a} and {b}"
        raise CheckpointError(found, where=str(self.folder), fix=f"{ADAPTERS} and model/ must come from the same run")

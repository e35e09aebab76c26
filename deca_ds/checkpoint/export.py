"""Sharded state of a run -> a Hugging Face directory: streamed, verified, and there only once it is whole.

On the host at any time: one output file's tensors and one conversion group, which is one parameter for most models (for
the mean, with its float32 accumulator; where adapters are merged into it, with these and a float32 copy).
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from deca_ds.checkpoint.adapters import MergedModel, read_adapters
from deca_ds.checkpoint.done import ended, missing_clients
from deca_ds.checkpoint.file_format import conversion_groups, empty_model, stored_shapes, to_file_format
from deca_ds.checkpoint.files import sync
from deca_ds.checkpoint.generation import adapt_saved
from deca_ds.checkpoint.open_steps import find_checkpoint
from deca_ds.checkpoint.shards import ShardedModel
from deca_ds.checkpoint.steps import steps_in
from deca_ds.checkpoint.tensor_files import save_file
from deca_ds.checkpoint.verify import compare_file, compare_shapes, digest, reload_model, reload_tokenizer
from deca_ds.engine.masters import rounded
from deca_ds.errors import CheckpointError, in_words
from deca_ds.plural import named, several
from deca_ds.run_folder import BASE, CHECKPOINTS, DONE, FAILED, MODEL

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*", "*.partial")

_CHECKPOINT = "it has checkpoints: export one with --checkpoint newest"

Progress = Callable[[int, int], None]


class Card(Protocol):
    """Writes the export's README.md."""

    def text(self, *, parameters: int, dtype: str, chat: bool) -> str:
        """Return the card of a model of so many parameters of this type. chat: whether there is a chat template."""
        ...


@dataclass(frozen=True)
class ExportReport:
    """What was exported.

    parameters: number of elements, shared ones counted once. bytes: size of the weight files. files: their number.
    source: "client 2" or "mean of 3 clients", and whether adapters were merged. note: what a user should know about the
    run, or None. stops: which tokens end a generated text where there are several, or None.
    """

    output: Path
    parameters: int
    bytes: int
    files: int
    source: str
    seconds: float
    note: str | None = None
    stops: str | None = None


def export_model(
    run: Path,
    output: Path,
    *,
    client: int | None = None,
    checkpoint: int | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 500_000_000,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    card: Card | None = None,
) -> ExportReport:
    """Write the model of one client, or the mean of all clients, as a directory that `from_pretrained` loads.

    run: a run's output folder with hf/ (configuration, tokenizer) and model/ (sharded state); adapters that it trained
    are merged. client: its number; None: the mean. checkpoint: the one after so many inner steps, in place of the
    trained model. dtype: "float32", "bfloat16" or "float16"; None: that of the model which was trained. Where it was
    bfloat16 with exact masters, float32 writes these. max_shard_bytes: largest weight file; a single larger tensor gets
    a file of its own. progress: called with (bytes done, bytes in all) after each tensor. card: what the export's
    README.md says; None: there is none.
    The mean leaves out the clients that DONE, or the checkpoint, names as missing. A run that is not marked DONE is
    exported if its sharded state is complete; the report then says so.
    Raises CheckpointError if `output` exists, the run is incomplete or damaged, a parameter is not finite or any check
    of the result fails; `output` is then not there.
    """
    started = time.monotonic()
    _check_folders(run, output)
    shards, missing = _find_shards(run, client, checkpoint)
    adapters = read_adapters(run)
    saved = MergedModel(shards, adapters) if adapters else shards
    model = empty_model(run / BASE, trust_remote_code=trust_remote_code)
    compare_shapes(saved, stored_shapes(model))
    stream = _Stream(saved, model, client, getattr(torch, dtype) if dtype else None)
    parameters = sum(t.numel() for t in model.parameters())
    try:
        with _whole(output, stream.total_bytes) as partial:
            shutil.copytree(run / BASE, partial, ignore=shutil.ignore_patterns(*_WEIGHTS))
            files = _write_weights(partial, stream, max_shard_bytes, progress)
            _set_dtype(partial / "config.json", stream.dtype)
            reload_model(partial, trust_remote_code=trust_remote_code)
            tokenizer = reload_tokenizer(partial, trust_remote_code=trust_remote_code)
            stops = adapt_saved(partial, tokenizer) if tokenizer is not None else None
            if card is not None:
                chat = tokenizer is not None and bool(tokenizer.chat_template)
                text = card.text(parameters=parameters, dtype=_label(stream.dtype), chat=chat)
                (partial / "README.md").write_text(text, encoding="utf-8")
            written = sum((partial / name).stat().st_size for name in files)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the export failed: {in_words(error, named=True)}",
            where=str(output),
            fix="check the disk's free space and permissions",
        ) from error
    source = stream.source + _which_state(missing if client is None else [], checkpoint)
    note = _unfinished(run) if checkpoint is None else None
    return ExportReport(output, parameters, written, len(files), source, time.monotonic() - started, note, stops)


def _check_folders(run: Path, output: Path) -> None:
    if os.path.lexists(output):
        raise CheckpointError("the output exists already", where=str(output), fix="give a new folder or remove it")
    if not run.is_dir():
        raise CheckpointError("no such run folder", where=str(run), fix="give the run.output folder of a run")


def _which_state(left_out: Sequence[int], checkpoint: int | None) -> str:
    """Return words for messages that say which state a model is; empty for the trained one with no client left out."""
    without = f" (without {', '.join(map(str, left_out))}, gone before the end)" if left_out else ""
    return without if checkpoint is None else f"{without}, after {several(checkpoint, 'inner step')}"


def _find_shards(run: Path, client: int | None, checkpoint: int | None) -> tuple[ShardedModel, list[int]]:
    """Return the sharded state, and the clients that a mean leaves out."""
    if checkpoint is None:
        missing = missing_clients(run)
        return _open_shards(run, client, missing), missing
    shards = find_checkpoint(run / CHECKPOINTS, checkpoint, client)
    return shards, [other for other in range(shards.clients_of_run) if client is None and other not in shards.clients]


@contextmanager
def _whole(output: Path, size: int) -> Iterator[Path]:
    """Yield the path of a folder that the body creates and fills with `size` bytes, then rename it to `output`. If
    anything fails, neither folder remains."""
    partial = output.with_name(f"{output.name}.partial-{secrets.token_hex(4)}")  # no other export's, on any host
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _refuse_full_disk(output.parent, size)
        yield partial
        for path in [*partial.rglob("*"), partial]:
            sync(path)
        if os.path.lexists(output):
            raise CheckpointError("the output has come to exist meanwhile", where=str(output), fix="give a new folder")
        partial.rename(output)
        sync(output.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class _Stream:
    """The model's tensors under their names in files, one conversion group at a time, each checked to be finite."""

    def __init__(
        self, saved: ShardedModel | MergedModel, model: PreTrainedModel, client: int | None, dtype: torch.dtype | None
    ):
        self.saved, self.model, self.client, self.cast = saved, model, client, dtype
        self.groups = conversion_groups(model, stored_shapes(model))
        # sizes are known before anything is read: the conversion runs once on tensors without storage
        self.planned: dict[str, Tensor] = {}
        for group in self.groups:
            empty = {n: torch.empty(saved.shape(n), dtype=self._out(n), device="meta") for n in group}
            for name, tensor in to_file_format(model, empty).items():
                self.planned[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        self.total_bytes = sum(tensor.nbytes for tensor in self.planned.values())
        self.dtype = next(t.dtype for t in self.planned.values() if t.is_floating_point())
        mean = f"mean of {several(len(saved.clients), 'client')}"
        self.source = mean if client is None else f"client {client}"
        self.source += ", adapters merged" if isinstance(saved, MergedModel) else ""

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for group in self.groups:
            converted = to_file_format(self.model, {name: self._read(name) for name in group})
            while converted:
                name = next(iter(converted))
                yield name, _own(converted.pop(name))

    def _read(self, name: str) -> Tensor:
        tensor = self.saved.mean(name) if self.client is None else self.saved.read(name, self.client)
        self._refuse_not_finite(name, tensor)
        out = self._out(name)
        as_trained = out == self.saved.model_dtype(name) != self.saved.dtype(name)
        cast = rounded(tensor) if as_trained else tensor.to(out)
        if cast.dtype != tensor.dtype and (count := _not_finite(cast)):
            raise CheckpointError(
                f"{count} of {cast.numel()} elements of {name} are too large for {_label(cast.dtype)}",
                where=self.source,
                fix="export as bfloat16 or float32",
            )
        return cast

    def _out(self, name: str) -> torch.dtype:
        trained = self.saved.model_dtype(name)
        return self.cast if self.cast and trained.is_floating_point else trained

    def _refuse_not_finite(self, name: str, tensor: Tensor) -> None:
        if not (count := _not_finite(tensor)):
            return
        bad = [client for client in self.saved.clients if _not_finite(self.saved.read(name, client))]
        raise CheckpointError(
            f"{count} of {tensor.numel()} elements of {name} are NaN or infinite",
            where=f"{self.source}; not finite in {named('client', bad) if bad else 'none, only their sum overflows'}",
            fix="training diverged there: export a client that did not, or train again with a smaller optimizer.lr",
        )


def _write_weights(folder: Path, stream: _Stream, max_shard_bytes: int, progress: Progress | None) -> list[str]:
    """Write and re-read the weight files, and the index if there are several; returns the files' names."""
    plan = split_torch_state_dict_into_shards(
        stream.planned, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_bytes
    )
    pending: dict[str, dict[str, Tensor]] = {}
    done = 0
    for name, tensor in stream:
        file = plan.tensor_to_filename[name]
        pending.setdefault(file, {})[name] = tensor
        done += tensor.nbytes
        if len(pending[file]) == len(plan.filename_to_tensors[file]):
            tensors = pending.pop(file)
            digests = {key: digest(value) for key, value in tensors.items()}
            save_file(tensors, folder / file, metadata={"format": "pt"})
            del tensors
            compare_file(folder / file, digests)
        del tensor  # the next one is read before the loop would let go of it
        if progress:
            progress(done, stream.total_bytes)
    if plan.is_sharded:
        parameters = sum(tensor.numel() for tensor in stream.planned.values())
        index = {"metadata": {"total_parameters": parameters, **plan.metadata}, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return list(plan.filename_to_tensors)


def _open_shards(run: Path, client: int | None, missing: list[int]) -> ShardedModel:
    if client in missing:
        raise CheckpointError(
            f"client {client} was gone before the run ended",
            where=str(run / DONE),
            fix="export the mean, or another client",
        )
    try:
        return ShardedModel(run / MODEL, None if client is None else [client], without=missing)
    except CheckpointError as error:
        note = _unfinished(run)
        if note is None:
            raise
        fix = error.fix if (run / MODEL).is_dir() or not steps_in(run / CHECKPOINTS) else _CHECKPOINT
        raise CheckpointError(f"{error.what} ({note})", where=error.where, fix=fix) from error


def _unfinished(run: Path) -> str | None:
    marker = ended(run)
    if marker == DONE:
        return None
    if marker == FAILED:
        reason = (run / FAILED).read_text(errors="replace").strip().splitlines()
        return "the run is marked FAILED" + (f": {reason[0]}" if reason else "")
    return "the run is not marked DONE: it was stopped, or is still running"


def _refuse_full_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"the export needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free",
            where=str(folder),
            fix="free some space or export to another disk",
        )


def _set_dtype(config: Path, dtype: torch.dtype) -> None:
    """Name the data type in config.json and its nested configurations, under the older key too where that is used."""
    fields = json.loads(config.read_text())
    fields["dtype"] = None
    for part in [fields, *(value for value in fields.values() if isinstance(value, dict))]:
        part |= {key: _label(dtype) for key in ("dtype", "torch_dtype") if key in part}
    config.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def _own(tensor: Tensor) -> Tensor:
    """Return the tensor contiguous, and copied if it is a view that would keep a larger tensor alive."""
    view = tensor.untyped_storage().nbytes() > tensor.nbytes
    return tensor.clone(memory_format=torch.contiguous_format) if view else tensor.contiguous()


def _not_finite(tensor: Tensor) -> int:
    return tensor.numel() - int(torch.isfinite(tensor).sum())


def _label(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

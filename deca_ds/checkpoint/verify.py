"""Checks that an exported directory is the model that was trained, and that transformers loads it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from deca_ds.checkpoint.adapters import MergedModel
from deca_ds.checkpoint.shards import ShardedModel
from deca_ds.errors import CheckpointError
from deca_ds.plural import first_few

_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
_some = partial(first_few, most=5)  # names in a message
_LOAD_FIX = "export with the transformers version of the run"


def compare_shapes(saved: ShardedModel | MergedModel, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless `saved` holds exactly the tensors in `expected` (name -> full shape)."""
    held = dict.fromkeys(saved.names)
    missing = [name for name in expected if name not in held]
    unexpected = [name for name in held if name not in expected]
    if missing or unexpected:
        found = [f"{_some(missing)} missing"] if missing else []
        found += [f"{_some(unexpected)} not known"] if unexpected else []
        raise CheckpointError(
            f"the saved model is not the one in config.json: {'; '.join(found)}",
            where=str(saved.folder),
            fix="hf/ and model/ must come from the same run, and transformers must be the version of the run",
        )
    for name, shape in expected.items():
        if saved.shape(name) != shape:
            raise CheckpointError(
                f"{name} has shape {saved.shape(name)}, config.json makes it {shape}",
                where=str(saved.folder),
                fix="hf/ and model/ must come from the same run",
            )


def digest(tensor: Tensor) -> str:
    """Return the checksum of a contiguous tensor's data type, shape and bytes."""
    state = hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=16)
    state.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def compare_file(path: Path, digests: Mapping[str, str]) -> None:
    """Read a weight file again, tensor by tensor. Raises CheckpointError unless it holds what `digests` (by name)
    says."""
    with safe_open(path, framework="pt") as file:
        wrong = sorted(set(file.keys()) ^ set(digests))
        wrong = wrong or [name for name in file.keys() if digest(file.get_tensor(name)) != digests[name]]  # noqa: SIM118
    if wrong:
        raise CheckpointError(
            f"{path.name} does not hold what was written to it: {_some(wrong)}",
            where=str(path.parent),
            fix="the disk may be failing: export to another one",
        )


def reload_model(folder: Path, *, trust_remote_code: bool) -> None:
    """Load `folder` as a user would, but on to the meta device: tensors are read and let go of one by one.

    Raises CheckpointError if it does not load, or with missing, unexpected or mismatched keys.
    """
    try:
        with _quiet():
            model_and_info: Any = AutoModelForCausalLM.from_pretrained(
                folder, device_map={"": "meta"}, output_loading_info=True, trust_remote_code=trust_remote_code
            )
            _, info = model_and_info
    except Exception as error:  # whatever keeps it from loading, the export is not good
        raise CheckpointError(f"the export does not load: {error}", fix=_LOAD_FIX) from error
    problems = [f"{what.replace('_', ' ')}: {_some(found)}" for what, found in info.items() if found]
    if problems:
        raise CheckpointError(f"the export loads with {'; '.join(problems)}", fix=_LOAD_FIX)


def reload_tokenizer(folder: Path, *, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer in `folder`, None if there is none. Raises CheckpointError if it does not load."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # as above
        raise CheckpointError(
            f"the tokenizer does not load: {error}", fix="check the tokenizer's files in the run's hf/ folder"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' progress bars, and its load report, which the raised error replaces."""
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()

"""Safetensors files that others may read where the umask lets them."""

from __future__ import annotations

import stat
from pathlib import Path

from safetensors import torch as safetensors
from torch import Tensor


def save_file(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a file with the permissions of any new file; by itself safetensors 0.8 lets only the owner read it.

    Raises OSError and SafetensorError.
    """
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    safetensors.save_file(tensors, path, metadata)
    path.chmod(mode)

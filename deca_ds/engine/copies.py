"""Copies of a batch to the device that computes."""

from __future__ import annotations

import torch
from torch import Tensor


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """Return `values` on the device; on a CPU the same tensor.

    A GPU's copy waits for what the GPU has to do before it, and the host does not wait for the copy: it comes from
    page-locked memory, which torch does not use again before it is done.
    """
    if device.type == "cuda" and values.device.type == "cpu":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)

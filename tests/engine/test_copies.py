"""Batches go to a GPU without a wait, and on a CPU they stay where they are."""

from unittest.mock import Mock

import torch

from deca_ds.engine.copies import on_device

GPU = torch.device("cuda")


def test_a_cpu_copies_nothing():
    values = torch.arange(3)
    assert on_device(values, torch.device("cpu")) is values


def test_a_gpus_copy_comes_from_page_locked_memory():
    values = Mock(device=torch.device("cpu"))
    on_device(values, GPU)
    values.pin_memory().to.assert_called_once_with(GPU, non_blocking=True)


def test_what_is_on_the_gpu_is_not_locked():
    values = Mock(device=GPU)
    assert on_device(values, GPU) is values.to(GPU)
    values.pin_memory.assert_not_called()

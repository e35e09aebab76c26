"""One test for each DeepSpeed internal that engine/internals.py leans on, without a training run."""

import functools
import inspect
from types import SimpleNamespace

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.partition_parameters import Init
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from deca_ds.engine import internals


def test_zero_without_an_optimizer_releases_on_request():
    assert callable(DeepSpeedZeRoOffload.release_backward_leftovers)
    assert callable(DeepSpeedZeRoOffload.partition_all_parameters)
    assert callable(DeepSpeedZeRoOffload.get_param_coordinator)


def test_the_trace_can_be_invalidated():
    assert callable(PartitionedParameterCoordinator._invalidate_trace)
    assert callable(PartitionedParameterCoordinator.is_invalid_trace)


def test_the_release_cache_is_found_and_is_an_lru_cache():
    cache = internals._release_cache(PartitionedParameterCoordinator)
    assert isinstance(cache, functools._lru_cache_wrapper)
    cache.cache_clear()
    assert cache.cache_info().currsize == 0


def test_a_missing_cache_is_named():
    class Changed:
        def _PartitionedParameterCoordinator__params_to_release(self):
            return set()

    with pytest.raises(AttributeError, match=r"engine/internals\.py"):
        internals._release_cache(Changed)


def test_gathers_follow_writes_and_writes_follow_gathers(monkeypatch):
    """On a GPU: the stream that DeepSpeed gathers on, and the one on which shards are written."""
    waits = []
    stream = lambda name: SimpleNamespace(name=name, wait_stream=lambda other: waits.append((name, other.name)))  # noqa: E731
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream("current"))
    none = SimpleNamespace(release_backward_leftovers=lambda: None, partition_all_parameters=lambda: None)
    zero = SimpleNamespace(_DeepSpeedZeRoOffload__allgather_stream=stream("gathers"), **vars(none))
    internals.follow_writes(zero)
    assert waits == [("gathers", "current")]
    internals.partition_all(zero)
    assert waits[1:] == [("current", "gathers")]
    on_cpu = SimpleNamespace(_DeepSpeedZeRoOffload__allgather_stream=None, **vars(none))
    internals.follow_writes(on_cpu)
    internals.partition_all(on_cpu)
    assert len(waits) == 2
    assert "self.__allgather_stream = " in inspect.getsource(DeepSpeedZeRoOffload.__init__)


def test_what_deepspeed_puts_around_a_model_can_be_taken_off():
    """tests/engine/test_engine.py sees that nothing of it is left."""
    assert callable(DeepSpeedZeRoOffload.destroy)
    source = inspect.getsource(DeepSpeedEngine.__init__)
    assert "self.module_forward_pre_hook = " in source and "self.module_forward_post_hook = " in source
    assert "linear_bk = torch.nn.functional.linear" in inspect.getsource(Init._enable_mem_efficient_linear)


@pytest.mark.parametrize(("ranks", "device"), [(2, "cpu"), (1, "cuda")])
def test_shards_that_are_no_whole_parameters_or_lie_elsewhere_are_gathered(ranks, device, monkeypatch):
    """With offload_param they are on the host, and the client computes on a GPU."""
    model = torch.nn.Linear(2, 3)
    for parameter in model.parameters():
        parameter.ds_tensor, parameter.ds_numel = parameter.detach().flatten(), parameter.numel()
        parameter.ds_tensor.ds_numel = parameter.numel()
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: ranks)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(get_accelerator(), "device_name", lambda: device)
    assert not internals.keep_shards_whole(SimpleNamespace(module=model))  # of which nothing else is touched


def test_the_shared_memory_extension_can_be_switched_off():
    import deepspeed

    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__


def test_a_module_can_be_gathered_whole():
    from deepspeed.utils import z3_leaf_module
    from torch import nn

    outer = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    internals.keep_whole([outer])
    assert z3_leaf_module(outer)
    assert not z3_leaf_module(outer[0])


@pytest.mark.parametrize(("frozen", "saved"), [(True, 1), (False, 2)])
def test_a_linear_layer_saves_its_input_only_for_the_gradient_of_its_weight(frozen, saved, monkeypatch):
    """DeepSpeed's function looks up what it runs at every call; what it saves first is the input."""
    from deepspeed.runtime.zero import linear, partition_parameters

    assert partition_parameters.zero3_linear_wrap is linear.zero3_linear_wrap
    monkeypatch.setattr(linear, "LinearFunctionForZeroStage3", linear.LinearFunctionForZeroStage3)
    internals.save_needed_inputs()
    once = linear.LinearFunctionForZeroStage3
    internals.save_needed_inputs()
    assert linear.LinearFunctionForZeroStage3 is once

    draw = torch.Generator().manual_seed(0)
    inputs, weight, bias = (torch.randn(shape, generator=draw) for shape in ((2, 3, 5), (4, 5), (4,)))
    tensors = [inputs.requires_grad_(), weight.requires_grad_(not frozen), bias.requires_grad_(not frozen)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        out = linear.zero3_linear_wrap(inputs, weight, bias)
    assert kept == [inputs.shape, weight.shape, bias.shape][-1 - saved :]
    wanted = [t for t in tensors if t.requires_grad]
    found = torch.autograd.grad(out.sin().sum(), wanted)
    for values, expected in zip(
        found, torch.autograd.grad((inputs @ weight.t() + bias).sin().sum(), wanted), strict=True
    ):
        torch.testing.assert_close(values, expected)

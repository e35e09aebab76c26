"""The DeepSpeed internals that block-wise training leans on, each behind a name of ours.

tests/engine/test_canaries.py holds one test for each, so that an upgrade of DeepSpeed fails loudly and here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn


class _Shard(Protocol):
    """A rank's slice of a parameter. ds_numel: its elements, padding included."""

    ds_numel: int
    data: Tensor


class _Partitioned(Protocol):
    """The attributes that ZeRO-3 adds to a parameter. ds_shape, ds_numel: of the whole parameter, without padding."""

    ds_status: object
    ds_shape: torch.Size
    ds_numel: int
    ds_tensor: _Shard


def partitioned(parameter: nn.Parameter) -> _Partitioned:
    """Return the parameter, typed with what ZeRO-3 has added to it."""
    return cast(_Partitioned, parameter)


def keep_shards_whole(engine: Any) -> bool:
    """Have `engine`, DeepSpeed's, leave the model an ordinary one where this rank's shards are whole parameters: each
    parameter becomes a view of its shard for good, and no hook is left. Returns whether that is so: the client has one
    rank, and its shards lie where it computes.

    ZeRO-3 gathers such parameters as views as well, so this takes no memory. Its hooks run fifty times as much Python
    as the model does, which a GPU would wait for, and change the order in which autograd adds gradients up.
    """
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses

    parameters = list(engine.module.parameters())
    near = get_accelerator().device_name()
    if torch.distributed.get_world_size() > 1 or any(shard(p).device.type != near for p in parameters):
        return False
    engine.optimizer.destroy()
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
    for module in engine.module.modules():
        module._parameters = dict(module._parameters.items())  # DeepSpeed's own looks at whatever is looked up
    parameters[0].all_gather(parameters)
    assert all(p.data_ptr() == shard(p).data_ptr() for p in parameters), "what is written to shards misses the model"
    torch.nn.functional.linear = InsertPostInitMethodToModuleSubClasses.linear_bk
    return True


def partition_all(zero: Any) -> None:
    """Release every gathered parameter. `zero` is the engine's DeepSpeedZeRoOffload; None: parameters stay whole.

    Needed after every backward pass: hooks of modules below the active block never fire, and what they gathered would
    stay, and go stale once the shards are written. What writes to shards after this call follows the gathers before it.
    """
    if zero is None:
        return
    zero.release_backward_leftovers()
    zero.partition_all_parameters()
    if (gathering := _gathering_stream(zero)) is not None:
        torch.cuda.current_stream().wait_stream(gathering)


def follow_writes(zero: Any) -> None:
    """Have gathers that start after this call see what was written to shards before it.

    DeepSpeed gathers on a stream of its own, which waits for nobody.
    """
    if zero is not None and (gathering := _gathering_stream(zero)) is not None:
        gathering.wait_stream(torch.cuda.current_stream())


def _gathering_stream(zero: Any) -> Any:
    """Return the stream on which ZeRO-3 gathers; None on a CPU, where nothing is asynchronous."""
    return zero._DeepSpeedZeRoOffload__allgather_stream


def forget_trace(zero: Any) -> None:
    """Make ZeRO-3 record anew which modules it visits; to be called when the set of trainable parameters changes.

    The trace does not invalidate itself when the backward pass merely stops earlier: it would keep prefetching layers
    that are not used, and a cache keyed by the old trace would keep parameters gathered.
    """
    if zero is None:
        return
    coordinator = zero.get_param_coordinator()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()
    _release_cache(type(coordinator)).cache_clear()


def _release_cache(coordinator_class: Any) -> Any:
    """Find the lru_cache around the coordinator's __params_to_release, through the wrappers that hide it."""
    pending: list[Callable[..., Any]] = [coordinator_class._PartitionedParameterCoordinator__params_to_release]
    while pending:
        function = pending.pop()
        if hasattr(function, "cache_clear"):
            return function
        if hasattr(function, "__wrapped__"):
            pending.append(function.__wrapped__)
        pending.extend(value for value in inspect.getclosurevars(function).nonlocals.values() if callable(value))
    raise AttributeError("DeepSpeed's __params_to_release has no lru_cache any more: see engine/internals.py")


def gathered(model: nn.Module) -> Iterator[str]:
    """Return the names of the parameters that are whole on this rank at the moment."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    return (name for name, p in model.named_parameters() if partitioned(p).ds_status != ZeroParamStatus.NOT_AVAILABLE)


def keep_whole(modules: Sequence[nn.Module]) -> None:
    """Let ZeRO-3 gather each of `modules` with all that is inside it, whenever it runs.

    For modules that use others of their children for other data: ranks with different data would gather different
    parameters, and wait for each other or mix them up. To be called before deepspeed.initialize.
    """
    from deepspeed.utils import set_z3_leaf_module

    for module in modules:
        set_z3_leaf_module(module, True)


def shard(parameter: nn.Parameter) -> Tensor:
    """Return this rank's slice of `parameter` without its padding: 1-D, a view that writes through.

    Rank r of k holds elements [r*n, (r+1)*n) of the row-major parameter, n = ceil(numel / k); the tail of the last
    ranks' slices is padding of undefined value, or the slice is empty.
    """
    start, stop = shard_range(parameter)
    return partitioned(parameter).ds_tensor.data.narrow(0, 0, stop - start)


def shard_range(parameter: nn.Parameter) -> tuple[int, int]:
    """Return the first and the last-plus-one element of the row-major parameter that this rank holds."""
    size, numel = partitioned(parameter).ds_tensor.ds_numel, partitioned(parameter).ds_numel
    rank = torch.distributed.get_rank()
    return min(rank * size, numel), min((rank + 1) * size, numel)


def leaf(parameter: nn.Parameter) -> nn.Module | None:
    """Return the module around the parameter that ZeRO-3 gathers as a whole, because what runs in it may differ from
    rank to rank; None outside such modules."""
    return getattr(parameter, "ds_z3_leaf_module", None)


def is_leaf(module: nn.Module) -> bool:
    """Return whether ZeRO-3 gathers the module as a whole."""
    from deepspeed.utils import z3_leaf_module

    return bool(z3_leaf_module(module))


def overwrite(parameter: nn.Parameter, values: Tensor) -> None:
    """Give a parameter, ordinary or partitioned, new values of its full shape; no communication."""
    if hasattr(parameter, "ds_tensor"):
        start, stop = shard_range(parameter)
        shard(parameter).copy_(values.view(-1)[start:stop])
    else:
        parameter.data.copy_(values)


def start() -> None:
    """Let DeepSpeed take over the torch world that exists; to be called before a model is built under zero.Init.

    Logs warnings only, and does not compile the shared-memory all-reduce for CPUs: ZeRO-3 uses no small all-reduce, the
    first run would compile for minutes, and a killed compiler leaves a lock that later runs wait for.
    """
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False)
    save_needed_inputs()


def save_needed_inputs() -> None:
    """Have linear layers keep their input for the backward pass only where it is needed: for their weight's gradient.

    Building a model under zero.Init replaces torch's linear function for good. Torch's own would keep a view of the
    gathered weight, and with it the storage; DeepSpeed's keeps the parameter, which may be partitioned meanwhile. But
    it keeps the input of frozen layers as well.
    """
    from deepspeed.runtime.zero import linear

    whole: Any = linear.LinearFunctionForZeroStage3
    if getattr(whole, "saves_what_is_needed", False):
        return

    class LinearThatSavesWhatIsNeeded(whole):  # type: ignore[misc]  # deepspeed has no types
        saves_what_is_needed = True

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            values, *others = inputs
            whole.setup_context(ctx, (values if ctx.needs_input_grad[1] else None, *others), output)

    linear.LinearFunctionForZeroStage3 = LinearThatSavesWhatIsNeeded  # is looked up at every call

"""The disk that one client's trained model and checkpoints take, in bytes of tensors, from shapes and the schedule.

Files have headers and folders manifests beside them, some kilobytes a file.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import prod
from pathlib import Path

from torch import nn

from deca_ds.algorithm import BlockPlan, Rule, Schedule, parameter_shapes
from deca_ds.config.monitoring import CheckpointConfig
from deca_ds.config.schema import ModelConfig
from deca_ds.run_folder import CHECKPOINTS, MODEL

_FLOAT32 = 4


@dataclass(frozen=True)
class Stored:
    """Bytes of one client over all its ranks. blocks: of each one at rest. active: what a checkpoint has beside them of
    the block that is open. frozen: parameters that no block trains. buffers: of the model."""

    blocks: tuple[int, ...]
    active: tuple[int, ...]
    frozen: int
    buffers: int

    @classmethod
    def of(cls, model: nn.Module, plan: BlockPlan, config: ModelConfig, rule: Rule) -> Stored:
        """Describe what is stored of a model. model: may be on the meta device, with float32 parameters whatever
        `config` says."""
        width = 2 if config.dtype == "bfloat16" else _FLOAT32
        trained = _FLOAT32 if config.masters == "exact" else width
        shapes, saved = parameter_shapes(model), model.state_dict(keep_vars=True)
        return cls(
            blocks=tuple(trained * block.numel for block in plan.blocks),
            active=tuple((_FLOAT32 * (1 + len(rule.buffers)) - trained) * block.numel for block in plan.blocks),
            frozen=width * sum(prod(shapes[name]) for name in plan.frozen),
            buffers=sum(buffer.nbytes for name, buffer in model.named_buffers() if name in saved),
        )

    @property
    def model(self) -> int:
        return sum(self.blocks) + self.frozen + self.buffers

    def checkpoint(self, schedule: Schedule, done: int) -> int:
        """Return the bytes of a whole checkpoint after `done` inner steps."""
        step = schedule.step(done) if done < len(schedule) else None
        return self.model + (self.active[step.block] if step is not None and step.inner else 0)


@dataclass(frozen=True)
class DiskNeed:
    """Bytes of one client. model: the trained one. checkpoints: the most that there are at a time: those that stay, and
    what is written anew for the next one. most: of both at a time."""

    model: int
    checkpoints: int
    most: int


def disk_need(stored: Stored, schedule: Schedule, config: CheckpointConfig) -> DiskNeed:
    """Return what a run that nothing interrupts needs; without `every`, also one that is told to stop at the dearest
    step.

    Every run saves a checkpoint when it has trained, before it evaluates and saves the model. Then the oldest may still
    be there, on ranks that wrote before others did. Where a rank is later than that, the others keep more. With `best`
    it is what the run needs at most.
    """
    opened = max(stored.active) if schedule.activation_steps > 1 else 0
    if config.best:  # at which steps these are is not known before: one that stays, and one that is written
        checkpoints = (config.keep + 2) * (stored.model + opened)
        return DiskNeed(stored.model, checkpoints, stored.model + checkpoints)
    if not config.every:
        return DiskNeed(stored.model, stored.model + opened, stored.model + max(stored.model, opened))
    peak = last = 0
    kept: deque[int] = deque(maxlen=config.keep)
    for done in dict.fromkeys([*range(config.every, len(schedule), config.every), len(schedule)]):
        new = stored.checkpoint(schedule, done)
        if len(kept) == config.keep:
            rests = set(range(len(stored.blocks))) - schedule.trained(kept[0], done)
            new -= stored.frozen + sum(stored.blocks[index] for index in rests)
        last = new + sum(stored.checkpoint(schedule, step) for step in kept)  # which share no file
        peak = max(peak, last)
        kept.append(done)
    return DiskNeed(stored.model, peak, max(peak, last + stored.model))


def taken(output: Path) -> int:
    """Return the bytes that the models and checkpoints in a run's folder take already, files with several names
    once."""
    found = {}
    for path in (path for part in (CHECKPOINTS, MODEL) for path in (output / part).rglob("*.safetensors")):
        state = path.stat()
        found[state.st_dev, state.st_ino] = state.st_size
    return sum(found.values())

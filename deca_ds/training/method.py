"""The method that a configuration asks for: its rule, its schedule, and whether the rest of it fits."""

from __future__ import annotations

from deca_ds.algorithm import methods
from deca_ds.algorithm.rule import Rule
from deca_ds.algorithm.schedule import Schedule, Step, learning_rate
from deca_ds.config import Config
from deca_ds.config.schema import OptimizerConfig
from deca_ds.engine.adapters import require_peft
from deca_ds.errors import ConfigError


def build_rule(config: Config) -> Rule:
    """The rule of algorithm.method with its coefficients."""
    a = config.algorithm
    return methods.build_rule(
        a.method,
        signal=a.signal,
        a1=a.a1,
        a2=a.a2,
        b1=a.b1,
        b2=a.b2,
        eps=a.eps,
        outer_lr=a.outer_lr,
        outer_momentum=a.outer_momentum,
    )


def build_schedule(config: Config, blocks: int) -> Schedule:
    """Which block is active when, and when it gossips."""
    return Schedule(
        rounds=config.algorithm.rounds,
        blocks=blocks,
        inner_steps=config.algorithm.inner_steps,
        gossip_every=config.gossip.every,
        order=config.blocks.order,
        seed=config.run.seed,
    )


def step_learning_rate(optimizer: OptimizerConfig, step: Step, steps: int) -> float:
    """The learning rate of an inner step of a run of `steps`."""
    return learning_rate(
        step.index,
        steps,
        peak=optimizer.lr,
        schedule=optimizer.schedule,
        warmup_steps=optimizer.warmup_steps,
        final_ratio=optimizer.final_lr_ratio,
    )


def check_method(config: Config) -> None:
    """Raise ConfigError where the method contradicts the blocks, the clients or the gossip."""
    name, method = config.algorithm.method, methods.METHODS[config.algorithm.method]
    chosen = f"algorithm.method={name}"
    if method.alone and config.cluster.clients > 1 and (config.gossip.graph != "isolated" or config.gossip.matrix):
        raise ConfigError(
            f"{chosen} does not gossip, but {config.cluster.clients} clients are joined by a graph",
            where="gossip.graph",
            fix="set gossip.graph=isolated (every client alone) or cluster.clients=1 (all data and ranks together)",
        )
    if method.whole_model is True and config.blocks.layers_per_block is not None:
        raise ConfigError(
            f"{chosen} trains {'all adapters' if method.adapters else 'the whole model'} at once, but "
            f"blocks.layers_per_block = {config.blocks.layers_per_block}",
            where="blocks.layers_per_block",
            fix="set blocks.layers_per_block=null, or algorithm.method=badam for blocks",
        )
    if method.whole_model is False and config.blocks.layers_per_block is None:
        raise ConfigError(
            f"{chosen} trains block by block, but blocks.layers_per_block is null",
            where="blocks.layers_per_block",
            fix="set it to 1 or more, or algorithm.method=adamw for the whole model",
        )
    if method.skips_gossip and config.gossip.every < 2:
        raise ConfigError(
            f"{chosen} takes several local steps an averaging, but gossip.every = {config.gossip.every}",
            where="gossip.every",
            fix="set gossip.every=2 or more, or algorithm.method=gossip-adam",
        )
    if config.algorithm.signal != "descent" and name != "deca":
        raise ConfigError(
            f"algorithm.signal = {config.algorithm.signal!r} belongs to the method deca, not to {name}",
            where="algorithm.signal",
            fix="leave it out, or set algorithm.method=deca",
        )
    if config.gossip.clip_radius is not None and len(method.rule.travels) > 1:
        raise ConfigError(
            f"{chosen} sends {' and '.join(method.rule.travels)}, for which one gossip.clip_radius cannot be right",
            where="gossip.clip_radius",
            fix="leave it out, or choose a method that sends parameters alone",
        )
    if method.adapters:
        require_peft()

"""The method that a configuration asks for: its rule, its schedule, and whether the rest of it fits."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields, replace
from typing import Any

from deca_ds.algorithm import METHODS, SIGNALS, Method, Rule, Schedule, build_rule, learning_rate
from deca_ds.config import Config
from deca_ds.config.checks import check_names
from deca_ds.config.schema import AlgorithmConfig, OptimizerConfig
from deca_ds.engine.adapters import require_peft
from deca_ds.errors import ConfigError
from deca_ds.gossip.codec import CODECS

NAMES: dict[str, Collection[str]] = {  # of keys that name something in a registry
    "algorithm.method": METHODS,
    "algorithm.signal": SIGNALS,
    "gossip.wire": CODECS,
}


def rule_of(config: Config) -> Rule:
    """Make the rule of algorithm.method with those keys of the section that it takes."""
    keys = {field.name: getattr(config.algorithm, field.name) for field in fields(config.algorithm)}
    return build_rule(**keys)


def in_words(config: Config) -> str:
    """Name the method, and its signal if it takes one, for readers of reports and model cards."""
    name, method = config.algorithm.method, METHODS[config.algorithm.method]
    signal = f" (signal: {config.algorithm.signal})" if "signal" in method.coefficients else ""
    return (method.title or name) + signal


def build_schedule(config: Config, blocks: int, rounds: int) -> Schedule:
    """Make the schedule of active blocks and averagings. rounds: see `count_rounds` of length.py."""
    return Schedule(
        rounds=rounds,
        blocks=blocks,
        inner_steps=config.algorithm.inner_steps,
        gossip_every=config.gossip.every,
        order=config.blocks.order,
        seed=config.run.seed,
    )


def step_learning_rate(optimizer: OptimizerConfig, index: int, steps: int) -> float:
    """Return the learning rate of inner step `index`, from 0 on, of a run of `steps`."""
    return learning_rate(
        index,
        steps,
        peak=optimizer.lr,
        schedule=optimizer.schedule,
        warmup_steps=optimizer.warmup_steps,
        final_ratio=optimizer.final_lr_ratio,
    )


def check_method(config: Config) -> None:
    """Raise ConfigError for a method or codec that there is not, and where it contradicts blocks, clients or gossip."""
    check_names(config, NAMES)
    method = METHODS[config.algorithm.method]
    _check_gossip(config, method)
    _check_blocks(config, method)
    _check_words(config)
    if method.adapters:
        require_peft()


def _check_gossip(config: Config, method: Method) -> None:
    """Raise ConfigError where the method averages otherwise than the section gossip says, or not at all."""
    chosen, clients, gossip = f"algorithm.method={config.algorithm.method}", config.cluster.clients, config.gossip
    if method.alone and clients > 1 and (gossip.graph != "isolated" or gossip.matrix):
        raise ConfigError(
            f"{chosen} does not gossip, but {clients} clients are joined by a graph",
            where="gossip.graph",
            fix="set gossip.graph=isolated (every client alone) or cluster.clients=1 (all data and ranks together)",
        )
    if method.skips_gossip and gossip.every < 2:
        raise ConfigError(
            f"{chosen} takes several local steps an averaging, but gossip.every = {gossip.every}",
            where="gossip.every",
            fix=f"set gossip.every=2 or more{_or_instead(method, skips_gossip=False)}",
        )
    if gossip.clip_radius is not None and len(method.rule.travels) > 1:
        raise ConfigError(
            f"{chosen} sends {' and '.join(method.rule.travels)}, for which one gossip.clip_radius cannot be right",
            where="gossip.clip_radius",
            fix="leave it out, or choose a method that sends parameters alone",
        )


def _check_blocks(config: Config, method: Method) -> None:
    """Raise ConfigError where the method trains the whole model, or must not, and blocks.layers_per_block differs."""
    chosen, layers = f"algorithm.method={config.algorithm.method}", config.blocks.layers_per_block
    if method.whole_model is True and layers is not None:
        raise ConfigError(
            f"{chosen} trains {'all adapters' if method.adapters else 'the whole model'} at once, but "
            f"blocks.layers_per_block = {layers}",
            where="blocks.layers_per_block",
            fix=f"set blocks.layers_per_block=null{_or_instead(method, whole_model=False)}",
        )
    if method.whole_model is False and layers is None:
        raise ConfigError(
            f"{chosen} trains block by block, but blocks.layers_per_block is null",
            where="blocks.layers_per_block",
            fix=f"set it to 1 or more{_or_instead(method, whole_model=True)}",
        )


def _check_words(config: Config) -> None:
    """Raise ConfigError for a word in the section algorithm that says what another method computes.

    A number may stand there for another run.
    """
    name = config.algorithm.method
    for field in fields(AlgorithmConfig):
        value = getattr(config.algorithm, field.name)
        takers = [other for other, row in METHODS.items() if field.name in row.coefficients]
        if isinstance(value, str) and takers and name not in takers and value != field.default:
            raise ConfigError(
                f"algorithm.{field.name} = {value!r} belongs to {', '.join(takers)}, not to {name}",
                where=f"algorithm.{field.name}",
                fix=f"leave it out, or set algorithm.method={takers[0]}",
            )


def _or_instead(method: Method, **changed: Any) -> str:
    """Return words that name the method that differs in `changed` alone, if there is one."""
    wanted = replace(method, **changed)
    alike = [name for name, other in METHODS.items() if other.asks_as(wanted)]
    return f", or algorithm.method={alike[0]}" if alike else ""

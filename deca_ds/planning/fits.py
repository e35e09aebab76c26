"""The nearest setting that fits where the configured one does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from deca_ds.algorithm import METHODS
from deca_ds.config import Config


@dataclass(frozen=True)
class Setting:
    """A configuration and the ranks of a client."""

    config: Config
    ranks: int


@dataclass(frozen=True)
class Move:
    """One change of a setting. name: for people. make: returns the changed setting, or None where the change has no
    effect or is impossible."""

    name: str
    make: Callable[[Setting], Setting | None]


def moves(setting: Setting) -> Iterator[Move]:
    """Yield changes, first those that leave the training's numbers alike up to rounding, then those that do not."""
    yield Move("evaluation.batch_size=1", _smaller_evaluation)
    smaller = [rows for rows in (8, 4, 2, 1) if rows < setting.config.data.micro_batch_size]
    for rows in smaller:
        yield Move(f"data.micro_batch_size={rows}", partial(_micro_batch, rows=rows))
    yield Move("model.gradient_checkpointing=true", _checkpointing)
    for factor in (2, 4, 8):
        ranks = factor * setting.ranks
        yield Move(f"{ranks} ranks a client", partial(_ranks, ranks=ranks))
    yield Move("blocks.layers_per_block=1", _one_layer)
    yield Move("model.dtype=bfloat16", _bfloat16)


def nearest(setting: Setting, fits: Callable[[Setting], bool]) -> tuple[Setting, list[str]] | None:
    """Find a setting that fits, and the names of its moves, none of which can be left out; None if no moves suffice.

    setting: one that does not fit.
    """
    made: list[Move] = []
    now = setting
    for move in moves(setting):
        after = move.make(now)
        if after is None:
            continue
        made.append(move)
        now = after
        if fits(now):
            break
    else:
        return None
    for move in reversed(list(made)):
        fewer = [other for other in made if other is not move]
        if (without := _all(setting, fewer)) is not None and fits(without):
            made, now = fewer, without
    return now, _names(made)


def _all(setting: Setting, made: Sequence[Move]) -> Setting | None:
    for move in made:
        after = move.make(setting)
        if after is None:
            return None
        setting = after
    return setting


def _names(made: Sequence[Move]) -> list[str]:
    """Name the moves; of several values of one key, or numbers of ranks, only the last."""
    by_key = {move.name.split("=")[0].lstrip("0123456789 "): move.name for move in made}
    return list(by_key.values())


def _smaller_evaluation(of: Setting) -> Setting | None:
    if of.config.evaluation.batch_size == 1:
        return None
    return replace(of, config=replace(of.config, evaluation=replace(of.config.evaluation, batch_size=1)))


def _micro_batch(of: Setting, rows: int) -> Setting | None:
    if of.config.data.batch_size % (rows * of.ranks):
        return None
    return replace(of, config=replace(of.config, data=replace(of.config.data, micro_batch_size=rows)))


def _checkpointing(of: Setting) -> Setting | None:
    if of.config.model.gradient_checkpointing:
        return None
    return replace(of, config=replace(of.config, model=replace(of.config.model, gradient_checkpointing=True)))


def _ranks(of: Setting, ranks: int) -> Setting | None:
    if of.config.data.batch_size % (of.config.data.micro_batch_size * ranks):
        return None
    return replace(of, ranks=ranks)


def _one_layer(of: Setting) -> Setting | None:
    if of.config.blocks.layers_per_block in (1, None) or METHODS[of.config.algorithm.method].whole_model:
        return None
    return replace(of, config=replace(of.config, blocks=replace(of.config.blocks, layers_per_block=1)))


def _bfloat16(of: Setting) -> Setting | None:
    if of.config.model.dtype == "bfloat16":
        return None
    return replace(of, config=replace(of.config, model=replace(of.config.model, dtype="bfloat16")))

"""The nearest setting that fits: no move too many, no move that cannot be made."""

from dataclasses import replace

import pytest

from deca_ds.config import load_config
from deca_ds.planning.fits import Setting, nearest


def setting(ranks: int = 1, **keys) -> Setting:
    given = {"data.batch_size": 16, "data.micro_batch_size": 4} | {k.replace("__", "."): v for k, v in keys.items()}
    return Setting(
        load_config(None, ["model.path=none", "run.output=none", *(f"{k}={v}" for k, v in given.items())]), ranks
    )


def needs(of: Setting) -> float:
    """A made-up memory: blocks of 8 a layer, shards of 24, and passes."""
    config = of.config
    width = 1 if config.model.dtype == "bfloat16" else 2
    passes = config.data.micro_batch_size * (1 if config.model.gradient_checkpointing else 10)
    state = (8 * config.blocks.layers_per_block + 24 * width) / of.ranks
    return state + max(passes, config.evaluation.batch_size)


def found(limit: float, start: Setting):
    return nearest(start, lambda of: needs(of) <= limit)


def test_the_first_move_that_is_enough_is_the_only_one():
    start = setting()
    assert needs(start) == 16 + 48 + 40
    assert found(90, start)[1] == ["data.micro_batch_size=2"]
    assert found(75, start)[1] == ["data.micro_batch_size=1"]
    changed, moves = found(72, start)  # with gradient checkpointing, neither smaller passes nor evaluations are needed
    assert moves == ["model.gradient_checkpointing=true"]
    assert changed.config.data.micro_batch_size == 4 and changed.config.evaluation.batch_size == 8
    assert changed.config.model.gradient_checkpointing and not start.config.model.gradient_checkpointing


def test_moves_add_up_where_one_is_not_enough():
    changed, moves = found(34, setting())
    assert needs(changed) == 32 + 2 and moves == [
        "evaluation.batch_size=1", "data.micro_batch_size=2", "model.gradient_checkpointing=true", "2 ranks a client",
    ]  # fmt: skip


def test_ranks_must_share_the_batch():
    with_one = setting(data__batch_size=3, data__micro_batch_size=3)
    changed, moves = found(50, with_one)
    assert (changed.ranks == 1 and "blocks.layers_per_block=1" in moves) or "model.dtype=bfloat16" in moves


def test_a_method_of_one_block_has_no_smaller_blocks():
    whole = setting(algorithm__method="adamw", blocks__layers_per_block="null", cluster__clients=1)
    tried: list[Setting] = []
    assert nearest(whole, lambda of: tried.append(of) is not None) is None
    assert {of.config.blocks.layers_per_block for of in tried} == {None} and len(tried) == 8


def without(of: Setting, move: str) -> Setting:
    """With what the move has changed as it was."""
    before = setting().config
    if move.endswith("ranks a client"):
        return replace(of, ranks=of.ranks // 2)
    section, key = move.split("=")[0].split(".")
    was = replace(getattr(of.config, section), **{key: getattr(getattr(before, section), key)})
    return replace(of, config=replace(of.config, **{section: was}))


@pytest.mark.parametrize("limit", [100, 75, 60, 45, 30, 20, 12])
def test_no_move_can_be_left_out(limit):
    changed, moves = found(limit, setting())
    assert needs(changed) <= limit
    for move in moves:
        fewer = without(changed, move)
        assert needs(fewer) > limit or 16 % (fewer.ranks * fewer.config.data.micro_batch_size)


def test_nothing_is_enough_for_nothing():
    assert found(0, setting()) is None

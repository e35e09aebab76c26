"""The methods by name: which rule each runs, and what it asks of blocks, clients and gossip."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from deca_ds.algorithm.baselines import DiLoCo, GtAdam, QgAdam
from deca_ds.algorithm.deca import DecaRule
from deca_ds.algorithm.rule import Rule


@dataclass(frozen=True)
class Method:
    """A named way to train.

    rule: its inner step. about: one line for people. fixed: coefficients that its name settles.
    alone: True where clients must not gossip. whole_model: True or False where the method decides whether there is one
    block or several; None: both are fine. skips_gossip: gossip must not follow every inner step. adapters: low-rank
    adapters are that block, and the model under them is frozen.
    """

    rule: type[Rule]
    about: str
    fixed: tuple[tuple[str, str], ...] = ()
    alone: bool = False
    whole_model: bool | None = None
    skips_gossip: bool = False
    adapters: bool = False


_NO_SIGNAL = (("signal", "none"),)
METHODS: dict[str, Method] = {
    "deca": Method(DecaRule, "block-wise Adam whose moments take a signal from gossip"),
    "gossip-adam": Method(DecaRule, "local Adam step, then average: DECA without a signal", _NO_SIGNAL),
    "local-adam": Method(DecaRule, "gossip-adam with several local steps an averaging", _NO_SIGNAL, skips_gossip=True),
    "qg-adam": Method(QgAdam, "Adam whose moments follow the network's direction"),
    "gt-adam": Method(GtAdam, "Adam on tracked gradients, twice the traffic"),
    "diloco": Method(DiLoCo, "local AdamW steps, then an outer Nesterov step"),
    "dec-lora": Method(
        DecaRule, "gossip-adam on low-rank adapters of a frozen model", _NO_SIGNAL, whole_model=True, adapters=True
    ),
    "badam": Method(DecaRule, "block-wise Adam without gossip", _NO_SIGNAL, alone=True, whole_model=False),
    "adamw": Method(DecaRule, "AdamW on all parameters without gossip", _NO_SIGNAL, alone=True, whole_model=True),
}


def build_rule(method: str, **coefficients: float | str) -> Rule:
    """The rule of a method. coefficients: of all methods; a rule takes those that it knows.

    Raises ValueError for an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    known = {field.name for field in fields(METHODS[method].rule)}
    taken: dict[str, Any] = {name: value for name, value in coefficients.items() if name in known}
    return METHODS[method].rule(**(taken | dict(METHODS[method].fixed)))

"""The methods by name: which rule each runs, and what it asks of blocks, clients and gossip.

A row here and a class is all that a method is: checks, the plan, the simulator, tests and the manual's table follow.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from deca_ds.algorithm.baselines import DiLoCo, GasLoC, GossipAdam, GtAdam, NoLoCo, QgAdam
from deca_ds.algorithm.deca import DecaRule
from deca_ds.algorithm.exact_diffusion import DecaExactDiffusion
from deca_ds.algorithm.rule import Rule


@dataclass(frozen=True)
class Method:
    """A named way to train.

    rule: its inner step. about: for the table in docs/algorithm.md. title: its name for readers of reports and model
    cards; "": the name in the configuration. papers: on arXiv, that it comes from. alone: True where clients must
    not gossip.
    whole_model: True or False where the method decides whether there is one block or several; None: both are fine.
    skips_gossip: gossip must not follow every inner step. adapters: low-rank adapters are that block, and the model
    under them is frozen.
    """

    rule: type[Rule]
    about: str
    title: str = ""
    papers: tuple[str, ...] = ()
    alone: bool = False
    whole_model: bool | None = None
    skips_gossip: bool = False
    adapters: bool = False

    @property
    def coefficients(self) -> frozenset[str]:
        """The keys of the configuration's section algorithm that its rule takes."""
        return frozenset(field.name for field in fields(self.rule))

    def asks_as(self, other: Method) -> bool:
        """Return whether the two differ in nothing but what is said of them."""
        return replace(self, about=other.about, title=other.title, papers=other.papers) == other


METHODS: dict[str, Method] = {
    "deca": Method(
        DecaRule,
        "block-wise Adam whose moments take h from the averaging; `algorithm.signal` chooses h",
        title="DECA",
        papers=("2606.03209",),
    ),
    "deca-ed": Method(
        DecaExactDiffusion,
        "deca whose next step repeats what the last averaging has changed; ours, from DECA and exact diffusion",
        title="DECA with exact diffusion",
        papers=("2606.03209", "1702.05122"),
    ),
    "gossip-adam": Method(GossipAdam, "a local Adam step, then an averaging; no signal; per block, or the whole model"),
    "local-adam": Method(GossipAdam, "gossip-adam with `gossip.every` >= 2", skips_gossip=True),
    "qg-adam": Method(QgAdam, "Adam whose moments follow the network's direction", papers=("2102.04761",)),
    "gt-adam": Method(GtAdam, "Adam on tracked gradients", papers=("1602.00591",)),
    "diloco": Method(
        DiLoCo,
        "`gossip.every` local AdamW steps, then an outer Nesterov step, on any graph",
        papers=("2311.08105",),
    ),
    "noloco": Method(
        NoLoCo,
        "`gossip.every` local AdamW steps, then an outer step with momentum towards the average; with "
        "`gossip.graph=random_pairs` as in the paper, or on any graph",
        papers=("2506.10911",),
    ),
    "gasloc": Method(
        GasLoC,
        "`gossip.every` local AdamW steps, then an averaging with momentum, on any graph",
        papers=("2606.11081",),
    ),
    "dec-lora": Method(
        GossipAdam,
        "gossip-adam on low-rank adapters of a frozen model; needs the extra `lora`",
        whole_model=True,
        adapters=True,
    ),
    "badam": Method(
        GossipAdam,
        "block-wise Adam without gossip: `cluster.clients=1` or `gossip.graph=isolated`",
        alone=True,
        whole_model=False,
    ),
    "adamw": Method(
        GossipAdam,
        "AdamW on all parameters without gossip. One client is data-parallel ZeRO-3 over all ranks (the upper "
        "reference); `gossip.graph=isolated` trains every client alone (the lower one)",
        alone=True,
        whole_model=True,
    ),
}


def build_rule(method: str, **coefficients: float | str) -> Rule:
    """Make the rule of a method. coefficients: of all methods; a rule takes those that it knows.

    Raises ValueError for an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    row = METHODS[method]
    taken: dict[str, Any] = {name: value for name, value in coefficients.items() if name in row.coefficients}
    return row.rule(**taken)

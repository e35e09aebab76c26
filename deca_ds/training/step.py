"""One inner step of one client: gradient, local step, gossip, what gossip tells the method. Start reading here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor

from deca_ds.algorithm import Rule, Step, local_step, squared_norm
from deca_ds.config.schema import OptimizerConfig
from deca_ds.engine.client import BlockState, Client, GradientStats
from deca_ds.gossip.averaging import Mean
from deca_ds.gossip.gossip import Gossip
from deca_ds.gossip.strategies import begin

# Ends an averaging of which everything has been sent, by calling what it is given, once and before anybody looks at the
# model, the block's state or what gossip counts. Between, the last chunks travel.
Boundary = Callable[[Callable[[], None]], None]


def at_once(end: Callable[[], None]) -> None:
    """The Boundary that leaves nothing between."""
    end()


def inner_step(
    client: Client,
    state: BlockState,
    rule: Rule,
    gossip: Gossip,
    step: Step,
    micro_batches: Sequence[Mapping[str, Tensor]],
    lr: float,
    optimizer: OptimizerConfig,
    check: Callable[[Step, GradientStats], None] = lambda step, stats: None,
    boundary: Boundary = at_once,
) -> GradientStats:
    """Train the active block for one step and average it with the neighbours; equations in algorithm/.

    micro_batches: this rank's share of the client's batch. The block's shard is worked through in chunks: while one
    travels, the next one is computed. At the end theta holds the mixed masters, and the model's shards these, rounded.
    check: raises an error for a gradient that must not be used. boundary: where the averaging ends.
    """
    stats = client.gradient(micro_batches, optimizer.clip_norm, gossip.transport.progress.tick)
    check(step, stats)
    averaging = begin(gossip, step.gossip)

    def accept(means: Iterable[Mean]) -> None:
        for chunk, name, values in means:
            rule.accept(state.part(chunk.part), name, values)

    runs = state.local_steps.next(state.reached)
    chunks = gossip.chunks(client.block_numels())
    assert sum(chunk.numel for chunk in chunks) == state.theta.numel(), "the shard is not ZeRO-3's of this block"
    for chunk in chunks:
        local_step(rule, state.tensors, runs, chunk.part, lr=lr, weight_decay=optimizer.weight_decay)
        for name in rule.travels if averaging.mixes else ():
            accept(averaging.send(chunk, name, state.tensors[name][chunk.part]))

    def end() -> None:
        accept(averaging.settle())
        if not averaging.mixes:  # where clients may die, or are left out, some neighbours may have
            rule.stay(state.tensors)
        norm = client.client_sum(float(squared_norm(state.grad))) ** 0.5 if rule.needs_norm else 0.0
        rule.finish(state.tensors, lr=lr, norm=norm, mixed=averaging.mixes)
        client.write_back()

    boundary(end)
    return stats

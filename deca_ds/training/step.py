"""One inner step of one client: gradient, local step, gossip, what gossip tells the method. Start reading here."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from deca_ds.algorithm.local import local_step
from deca_ds.algorithm.norms import squared_norm
from deca_ds.algorithm.rule import Rule
from deca_ds.algorithm.schedule import Step
from deca_ds.config.schema import OptimizerConfig
from deca_ds.engine.client import BlockState, Client, GradientStats
from deca_ds.gossip.averaging import Gossip, PendingMix
from deca_ds.transport.intersections import Chunk


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
) -> GradientStats:
    """Train the active block for one step and average it with the neighbours; equations in algorithm/.

    micro_batches: this rank's share of the client's batch. The block's shard is worked through in chunks: while one
    travels, the next one is computed. At the end theta holds the mixed masters, and the model's shards these, rounded.
    check: raises an error for a gradient that must not be used.
    """
    stats = client.gradient(micro_batches, optimizer.clip_norm, gossip.transport.progress.tick)
    check(step, stats)
    mixes = step.gossip is not None and gossip.has_neighbours(step.gossip)
    under_way: deque[tuple[Chunk, str, PendingMix]] = deque()

    def accept_oldest() -> None:
        chunk, name, pending = under_way.popleft()
        rule.accept(state.part(chunk.part), name, pending.wait())

    runs = state.local_steps.next(state.reached)
    message = 0
    chunks = gossip.chunks(client.block_numels())
    assert sum(chunk.numel for chunk in chunks) == state.theta.numel(), "the shard is not ZeRO-3's of this block"
    for chunk in chunks:
        local_step(rule, state.tensors, runs, chunk.part, lr=lr, weight_decay=optimizer.weight_decay)
        for name in rule.travels if mixes else ():
            if len(under_way) == gossip.window:
                accept_oldest()
            assert step.gossip is not None
            x = state.tensors[name][chunk.part]
            under_way.append((chunk, name, gossip.start(step.gossip, x, message, chunk)))
            message += 1
    if step.gossip is not None:
        mixes = gossip.settle(step.gossip)  # where clients may die, some neighbours may have
    while mixes and under_way:
        accept_oldest()

    if not mixes:
        rule.stay(state.tensors)
    norm = client.client_sum(float(squared_norm(state.grad))) ** 0.5 if rule.needs_norm else 0.0
    rule.finish(state.tensors, lr=lr, norm=norm, mixed=mixes)
    client.write_back()
    return stats

"""One inner step of one client: gradient, local step, gossip, what gossip tells the method. Start reading here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from torch import Tensor

from deca_ds.algorithm import Rule, Step, local_step, squared_norm
from deca_ds.config.schema import OptimizerConfig
from deca_ds.engine.client import BlockState, Client, GradientStats
from deca_ds.gossip.averaging import Mean
from deca_ds.gossip.gossip import Gossip
from deca_ds.gossip.strategies import begin

_ALONE = 2**24  # elements that make their local step together where nothing is sent: it bounds a rule's scratch

# Called, when all chunks have been sent, with the function that ends the averaging. It must call that function once,
# before anybody looks at the model, the block's state or gossip's counters. What it does before that overlaps with the
# last messages.
Boundary = Callable[[Callable[[], None]], None]


def at_once(end: Callable[[], None]) -> None:
    """End the averaging at once; the Boundary that overlaps nothing with the last messages."""
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
    """Train the active block for one step and average it with the neighbours; the equations are in algorithm/.

    The block's shard is processed in chunks: while one chunk travels, the local step of the next is computed. Where
    nothing is sent they are larger, as each costs a GPU's host some calls, and each step is made in place. At the end
    `state.theta` holds the averaged float32 masters, and the model's shards hold them rounded to the model's dtype.

    micro_batches: this rank's share of the client's batch; see Client.gradient. lr: of this step. check: raises an
    error for a gradient that must not be used, such as DivergedError. boundary: see Boundary. Raises GossipError if a
    neighbour does not answer or sends values that must not be averaged.
    """
    stats = client.gradient(micro_batches, optimizer.clip_norm, gossip.transport.progress.tick)
    check(step, stats)
    averaging = begin(gossip, step.gossip)
    alone = not averaging.mixes

    def accept(means: Iterable[Mean]) -> None:
        for chunk, name, values in means:
            rule.accept(state.part(chunk.part), name, values)

    runs, numel = state.local_steps.next(state.reached), state.theta.numel()
    step_of = partial(local_step, rule, state.tensors, runs, lr=lr, weight_decay=optimizer.weight_decay, alone=alone)
    if alone:
        for start in range(0, numel, _ALONE):
            step_of(slice(start, start + _ALONE))
    else:
        chunks = gossip.chunks(client.block_numels())
        assert sum(chunk.numel for chunk in chunks) == numel, "the shard is not ZeRO-3's of this block"
        for chunk in chunks:
            step_of(chunk.part)
            for name in rule.travels:
                accept(averaging.send(chunk, name, state.tensors[name][chunk.part]))

    def end() -> None:
        accept(averaging.settle())
        if not averaging.mixes and not alone:  # known only now: the neighbours have died or been left out
            rule.stay(state.tensors)
        norm = client.client_sum(float(squared_norm(state.grad))) ** 0.5 if rule.needs_norm else 0.0
        rule.finish(state.tensors, lr=lr, norm=norm, mixed=averaging.mixes)
        client.write_back()

    boundary(end)
    return stats

"""The run of one client: blocks in turn, inner steps, evaluations, and the trained shards at the end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from deca_ds.algorithm.rule import Rule
from deca_ds.algorithm.schedule import Schedule, Step
from deca_ds.checkpoint.shards import Slice, save_shards
from deca_ds.cluster import Cluster
from deca_ds.config.schema import Config
from deca_ds.engine.client import Client, GradientStats
from deca_ds.gossip.mix import Gossip
from deca_ds.training.evaluation import Evaluator
from deca_ds.training.method import step_learning_rate
from deca_ds.training.metrics import Metrics, peak_memory_bytes
from deca_ds.training.step import inner_step


@dataclass
class Trainer:
    """Everything that one rank trains with; made by `deca_ds.training.setup.build`."""

    config: Config
    cluster: Cluster
    client: Client
    rule: Rule
    schedule: Schedule
    gossip: Gossip
    batches: Iterator[list[dict[str, Tensor]]]
    evaluator: Evaluator
    metrics: Metrics
    output: Path

    def train(self) -> None:
        """Run the whole schedule and save the shards. All ranks of all clients call this."""
        self._evaluate(0)
        state = None
        for step in self.schedule:
            if step.opens:
                state = self.client.open_block(step.block, self.rule.buffers)
                self.rule.open(state.tensors)
            started, waited = time.perf_counter(), self.gossip.wait_seconds
            lr = step_learning_rate(self.config.optimizer, step, len(self.schedule))
            stats = inner_step(
                self.client, state, self.rule, self.gossip, step, next(self.batches), lr, self.config.optimizer
            )
            seconds = time.perf_counter() - started
            self.metrics.step(step.index, self._record(step, stats, lr, seconds, self.gossip.wait_seconds - waited))
            if step.closes:
                self.client.close_block()
                state = None
            if self._evaluates_after(step):
                self._evaluate(step.index + 1)
        self._save()

    def _evaluates_after(self, step: Step) -> bool:
        done, every = step.index + 1, self.config.evaluation.every
        return done == len(self.schedule) or (every > 0 and done % every == 0)

    def _record(self, step: Step, stats: GradientStats, lr: float, seconds: float, waited: float) -> dict[str, Any]:
        return {
            "round": step.round,
            "block": self.client.plan.blocks[step.block].label,
            "inner": step.inner,
            "lr": lr,
            "seconds": seconds,
            "tokens_per_second": stats.tokens / seconds,
            "gossip_wait_seconds": waited,
            "gossip_bytes_sent_by_rank": self.gossip.bytes_sent,
            **asdict(stats),
        }

    def _evaluate(self, done: int) -> None:
        scores = self.evaluator.evaluate()
        job = {key: scores.pop(key) for key in ("mean", "consensus_distance") if key in scores}
        own = scores | {
            "peak_memory_bytes_by_rank": peak_memory_bytes(self.client.device),
            "gossip_bytes_sent": int(self.client.client_sum(self.gossip.bytes_sent)),
            "gossip_wait_seconds": self.gossip.wait_seconds,
        }
        self.metrics.evaluation(done, own, job)

    def _save(self) -> None:
        """Every rank writes its own slices, a file a block; `deca export` puts them together."""
        plan = self.client.plan
        groups = [(block.label, self._slices(block.names)) for block in plan.blocks]
        groups.append(("rest", chain(self._slices(plan.frozen), self._buffer_slices())))
        save_shards(
            self.output / "model",
            groups,
            client=self.cluster.client,
            clients=self.cluster.clients,
            rank=self.cluster.shard,
            ranks=self.cluster.ranks,
            step=len(self.schedule),
        )

    def _slices(self, names: tuple[str, ...]) -> Iterator[Slice]:
        for name, start, stop, values in self.client.shards(names):
            yield Slice(name, self.client.shapes[name], start, stop, values)

    def _buffer_slices(self) -> Iterator[Slice]:
        for name, buffer in self.client.buffers():
            flat = buffer.reshape(-1)
            size = -(-flat.numel() // self.cluster.ranks)
            start, stop = (min(flat.numel(), (self.cluster.shard + end) * size) for end in (0, 1))
            yield Slice(name, tuple(buffer.shape), start, stop, flat[start:stop])

"""Run a configuration with all clients in this process; numbers as in the real job, to rounding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from deca_ds.algorithm import LocalSteps, Rule, Schedule, State, Step, local_step
from deca_ds.config import Config
from deca_ds.data import ClientData, evaluation_batches, training_batches
from deca_ds.engine.masters import rounded
from deca_ds.gossip import MixingSchedule
from deca_ds.gossip.codec import CODECS
from deca_ds.simulation.averaging import means_of
from deca_ds.simulation.stacked import StackedClients
from deca_ds.training.chosen_method import step_learning_rate
from deca_ds.training.divergence import not_finite
from deca_ds.training.evaluation import MEAN, average, empty_totals, summarize, take_in
from deca_ds.training.pace import evaluates

SPREAD_COLUMNS = 1 << 14  # of all clients at a time: what a processor's cache holds in double precision


@dataclass
class Simulation:
    """n clients, their data and how they train; made by `deca_ds.simulation.setup.build`.

    steps: a record per inner step, see `_record`. evaluations: a record per evaluation, see `_evaluate`.
    untrained: block -> those of its parameters that no client's gradient has reached in its last activation. state: the
    active block's tensors, [n, numel] each; empty before the first inner step. sent: parameters, by each client so far.
    """

    config: Config
    clients: StackedClients
    rule: Rule
    schedule: Schedule
    mixing: MixingSchedule
    data: Sequence[ClientData]
    pad_id: int
    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    untrained: dict[str, list[str]] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict, init=False)
    sent: list[int] = field(default_factory=list, init=False)

    def run(self, *, evaluate_first: bool = True) -> Iterator[dict[str, Any]]:
        """Train to the end, step by step; yields every step's record.

        evaluate_first: score the models before the first step too. Raises DivergedError at the first loss, gradient,
        parameter, moment or score that is not finite.
        """
        batches = [self.batches(client) for client in range(self.clients.clients)]
        self.sent = [0] * self.clients.clients
        local_steps: list[LocalSteps] = []
        if evaluate_first:
            self._evaluate(0)
        for step in self.schedule:
            if step.opens:
                local_steps = self._open(step.block)
            state = self.state
            lr = step_learning_rate(self.config.optimizer, step.index, len(self.schedule))
            losses = [
                self._local_step(step, client, next(batches[client]), local_steps[client], lr)
                for client in range(self.clients.clients)
            ]
            before = spread(state["grad"])
            for rows, mixed in self._by_neighbours(step):
                self.exchange(state, rows, mixed, step, lr)
            self._refuse_state(step, state)
            model = self.config.model
            if step.closes and model.dtype == "bfloat16" and model.masters == "rounded":
                state["theta"].copy_(rounded(state["theta"]))
            record = self._record(step, lr, losses, before, spread(state["theta"]))
            self.steps.append(record)
            if step.closes:
                self._note_untrained(step, local_steps)
            yield record
            done = step.index + 1
            if evaluates(done, len(self.schedule), self.config.evaluation.every):
                self._evaluate(done)

    def _open(self, block: int) -> list[LocalSteps]:
        """Make the state of a block that becomes active; return each client's counts of local steps."""
        theta, local_steps = self.clients.block(block)
        self.state = {"theta": theta} | {name: torch.zeros_like(theta) for name in ("grad", *self.rule.buffers)}
        self.rule.open(self.state)
        return local_steps

    def _local_step(
        self, step: Step, client: int, batch: Sequence[Mapping[str, Tensor]], local_steps: LocalSteps, lr: float
    ) -> float:
        """Take one client's gradient and local step; return its loss. batch: its micro-batches."""
        own, optimizer = {name: tensor[client] for name, tensor in self.state.items()}, self.config.optimizer
        loss, norm, reached = self.clients.gradient(step.block, client, batch, own["grad"], optimizer.clip_norm)
        self._refuse(step, client, {"the loss is": loss, "the norm of the gradient is": norm})
        every_column = slice(0, own["grad"].numel())
        local_step(self.rule, own, local_steps.next(reached), every_column, lr=lr, weight_decay=optimizer.weight_decay)
        return loss

    def _note_untrained(self, step: Step, local_steps: Sequence[LocalSteps]) -> None:
        """Name the parameters of a block that no client's gradient has reached by the end of its activation."""
        names = self.clients.block_names(step.block)
        made = zip(*(own.made for own in local_steps), strict=True)
        never = [name for name, counts in zip(names, made, strict=True) if not any(counts)]
        if never:
            self.untrained[self.clients.plan.blocks[step.block].label] = never

    def _refuse_state(self, step: Step, state: State) -> None:
        norms = torch.linalg.vector_norm(state["theta"], dim=1).tolist()
        sums = {f"the optimizer's state {name!r} is": state[name].sum(dim=1).tolist() for name in self.rule.buffers}
        for client, norm in enumerate(norms):
            own = {name: values[client] for name, values in sums.items()}
            self._refuse(step, client, {"the norm of the block's parameters is": norm} | own)

    def _refuse(self, step: Step, client: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                block = self.clients.plan.blocks[step.block].label
                raise not_finite(client, name, value, f"inner step {step.index + 1}, block {block}")

    def exchange(self, state: State, rows: Tensor | None, mixed: bool, step: Step, lr: float) -> None:
        """Finish an inner step of the clients `rows` (None: of all, in place), with an averaging if `mixed`."""
        part = dict(state) if rows is None else {name: tensor[rows] for name, tensor in state.items()}
        if mixed:
            assert step.gossip is not None
            values = {name: state[name] for name in self.rule.travels}
            means = means_of(values, self.mixing, step.gossip, self.config.gossip)
            for name, mean in means.items():
                self.rule.accept(part, name, mean if rows is None else mean[rows])
        else:
            self.rule.stay(part)
        norm: Tensor | float = 0.0
        if self.rule.needs_norm:
            norm = torch.linalg.vector_norm(part["grad"], dim=1, keepdim=True, dtype=torch.float64).float()
        self.rule.finish(part, lr=lr, norm=norm, mixed=mixed)
        if rows is not None:
            for name, tensor in state.items():
                tensor[rows] = part[name]

    def _by_neighbours(self, step: Step) -> list[tuple[Tensor | None, bool]]:
        """Return the clients that average at this step and those that do not; [(None, ...)] if all do the same."""
        t = step.gossip
        averages = [
            t is not None and bool(self.mixing.sources(i, t) or self.mixing.destinations(i, t))
            for i in range(self.clients.clients)
        ]
        if len(set(averages)) == 1:
            return [(None, averages[0])]
        place = torch.tensor(averages)
        return [(place.nonzero().flatten(), True), ((~place).nonzero().flatten(), False)]

    def _record(self, step: Step, lr: float, losses: list[float], before: float, after: float) -> dict[str, Any]:
        """Make the record of an inner step. loss: per client, nats. spread_before, spread_after: sqrt(mean_i |x_i -
        mean|^2) of the active block before and after the averaging. bytes_sent: per client, since the start."""
        if step.gossip is not None:
            numel = self.clients.plan.blocks[step.block].numel * len(self.rule.travels)
            for client in range(self.clients.clients):
                self.sent[client] += numel * len(self.mixing.destinations(client, step.gossip))
        return {
            "step": step.index + 1,
            "round": step.round,
            "block": self.clients.plan.blocks[step.block].label,
            "inner": step.inner,
            "gossip": step.gossip is not None,
            "lr": lr,
            "loss": losses,
            "spread_before": before,
            "spread_after": after,
            "bytes_sent": [CODECS[self.config.gossip.wire].bytes * sent for sent in self.sent],
        }

    def _evaluate(self, done: int) -> None:
        """Score every client on its own and on the common set, and the mean model; compute the consensus distance."""
        common = self.data[0].common_evaluation
        mean = self.clients.values.mean(dim=0)
        record: dict[str, Any] = {"step": done, "consensus_distance": spread(self.clients.values), "clients": []}
        for client, data in enumerate(self.data):
            row, scores = self.clients.values[client], {}
            if data.own_evaluation is not None:
                scores["own"] = self._score(row, data.own_evaluation, f"client {client}")
            if common is not None:
                scores["common"] = self._score(row, common, f"client {client}")
            record["clients"].append(scores)
        if self.config.evaluation.mean_model and self.clients.clients > 1:
            if common is not None:
                record["mean"] = self._score(mean, common, MEAN)
            else:
                own = [data.own_evaluation for data in self.data]
                record["mean"] = average([None if held is None else self._score(mean, held, MEAN) for held in own])
        self.evaluations.append(record)

    def _score(self, row: Tensor, dataset: Dataset, whose: str) -> dict[str, Any]:
        totals = empty_totals(len(dataset))
        batches = evaluation_batches(
            dataset, batch_size=self.config.evaluation.batch_size, rank=0, ranks=1, pad_id=self.pad_id
        )
        for batch in batches:
            take_in(totals, batch["row"], self.clients.score(row, batch))
        return summarize(totals, dataset, self.data[0], whose)

    def batches(self, client: int) -> Iterator[list[dict[str, Tensor]]]:
        """Yield the micro-batches of each of a client's inner steps, see `training_batches`."""
        return training_batches(
            self.data[client].train,
            batch_size=self.config.data.batch_size,
            micro_batch_size=self.config.data.micro_batch_size,
            rank=0,
            ranks=1,
            seed=self.config.run.seed,
            client=client,
            pad_id=self.pad_id,
        )


def spread(x: Tensor) -> float:
    """Return the consensus distance sqrt(mean_i |x_i - mean|^2) of stacked parameters, [n, numel], in double
    precision."""
    total = 0.0
    for columns in x.split(SPREAD_COLUMNS, dim=1):
        part = columns.double()
        total += float((part - part.mean(dim=0)).square_().sum())
    return math.sqrt(total / len(x))

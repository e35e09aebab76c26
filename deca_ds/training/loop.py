"""The run of one client: one active block after the other, inner steps, evaluations, and the shards at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from deca_ds.algorithm import Rule, Schedule, Step
from deca_ds.checkpoint.part import Part
from deca_ds.checkpoint.write_shards import save_shards
from deca_ds.config import Config
from deca_ds.elastic import ElasticAgent
from deca_ds.engine.client import BlockState, Client, GradientStats
from deca_ds.engine.state import TrainingState, model_pieces
from deca_ds.errors import DataError, DivergedError
from deca_ds.gossip.gossip import Gossip
from deca_ds.launch.world import Cluster
from deca_ds.plural import several
from deca_ds.printing import print_wrapped
from deca_ds.run_folder import MODEL
from deca_ds.training import best
from deca_ds.training.checkpoints import Checkpoints, slice_groups
from deca_ds.training.chosen_method import step_learning_rate
from deca_ds.training.claim import check_held
from deca_ds.training.divergence import Watch, with_checkpoint
from deca_ds.training.evaluation import JOB_SCORES, Evaluator
from deca_ds.training.metrics import Metrics, peak_memory_bytes
from deca_ds.training.notices import untrained
from deca_ds.training.pace import evaluates
from deca_ds.training.scores import Evaluation
from deca_ds.training.step import inner_step
from deca_ds.transport import barrier
from deca_ds.watchdog.stop import StopByCommit, StopByStore


@dataclass
class Trainer:
    """Trains on one rank; constructed by `deca_ds.training.build.build`."""

    config: Config
    cluster: Cluster
    state: TrainingState
    gossip: Gossip
    batches: Iterator[list[dict[str, Tensor]]]
    evaluator: Evaluator
    metrics: Metrics
    checkpoints: Checkpoints
    stop: StopByStore | StopByCommit
    watch: Watch
    output: Path
    agent: ElasticAgent | None = None  # where clients may die
    stopped_early: str = field(default="", init=False)  # why, for people
    _untrained_told: set[int] = field(default_factory=set, init=False)  # blocks of which `_tell_untrained` has spoken
    _batch: list[dict[str, Tensor]] | None = field(default=None, init=False)  # of the next inner step, once it is made

    @property
    def client(self) -> Client:
        """See TrainingState."""
        return self.state.client

    @property
    def rule(self) -> Rule:
        """See TrainingState."""
        return self.state.rule

    @property
    def schedule(self) -> Schedule:
        """See TrainingState."""
        return self.state.schedule

    @property
    def done(self) -> int:
        """Inner steps so far."""
        return self.state.done

    def train(self) -> bool:
        """Run the rest of the schedule and save the trained shards. All ranks of all clients call this.

        Returns False if the job was told to stop before the end, or stops early: then the checkpoints of all ranks are
        on the disk. Raises DivergedError, which names the newest checkpoint, at the first value that is not finite.
        """
        try:
            return self._train()
        except DivergedError as error:
            raise with_checkpoint(error, self.checkpoints.folder, self.checkpoints.newest()) from None

    def _train(self) -> bool:
        through: dict[str, Any] = {}  # manifest of the state before the last evaluation
        while self._goes_on():
            is_through = self.done == len(self.schedule)
            if is_through:  # if the evaluation or the saving fails, the next start continues from here
                self.checkpoints.save()
                self.checkpoints.wait_for_all()
                through = self.checkpoints.manifest()
            if self._evaluates():
                self.cluster.progress.enter("evaluation", works=True)
                if self._compare(self._evaluate(), is_through):
                    break
            if is_through:
                self.cluster.progress.enter("saving", works=True)
                check_held(self.output)
                self._save(through)
                self.client.client_sum(0)  # all of its ranks have saved
                self.gossip.drain()
                return True
            self._inner_step(self.schedule.step(self.done))
            self.checkpoints.after_step()
        self.checkpoints.save()
        self.checkpoints.wait_for_all()
        self.gossip.drain()
        return False

    def meet(self) -> None:
        """Wait until all ranks of all clients are here."""
        self.gossip.commit.run(lambda: barrier(self.gossip.transport))

    def _goes_on(self) -> bool:
        """Return whether the job continues here, after letting in clients that come back."""
        if self.agent is not None:
            self.state.stopping = not self.stop.may_pass(self.done)
            self.agent.let_in(self.state)
        return self.stop.may_pass(self.done)

    def _inner_step(self, step: Step) -> None:
        block = self.client.plan.blocks[step.block].label
        self.cluster.progress.enter("gradient", step=step.index + 1, block=block, works=True)
        if step.opens:
            self.rule.open(self.client.open_block(step.block, self.rule.buffers).tensors)
        block_state = self.client.active
        assert block_state is not None
        started, waited = time.perf_counter(), self.gossip.wait_seconds
        lr = step_learning_rate(self.config.optimizer, step.index, len(self.schedule))
        batch = next(self.batches) if self._batch is None else self._batch
        stats = inner_step(
            self.client, block_state, self.rule, self.gossip, step, batch, lr, self.config.optimizer,
            self.watch.gradient, self._make_next_batch,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        self.metrics.step(step, self._record(step, stats, lr, seconds, self.gossip.wait_seconds - waited))
        if step.closes:
            self._tell_untrained(step, block_state)
            self.client.close_block()
        self.state.done = step.index + 1

    def _make_next_batch(self, end: Callable[[], None]) -> None:
        """Make the batch of the next inner step while the last chunks travel; a Boundary."""
        self._batch = next(self.batches)
        end()

    def _tell_untrained(self, step: Step, state: BlockState) -> None:
        """Report, once for every block, the parameters that no gradient has reached while it was active."""
        names = state.never_reached
        if names and self.cluster.is_leader and step.block not in self._untrained_told:
            self._untrained_told.add(step.block)
            what = untrained(state.block.label, names)
            print_wrapped(f"client {self.cluster.client}, inner step {step.index + 1}: {what}")

    def _evaluates(self) -> bool:
        return evaluates(self.done, len(self.schedule), self.config.evaluation.every)

    def _record(self, step: Step, stats: GradientStats, lr: float, seconds: float, waited: float) -> dict[str, Any]:
        skipped = self.gossip.skip_log.skipped if step.gossip is not None else []
        return {
            "round": step.round,
            "block": self.client.plan.blocks[step.block].label,
            "inner": step.inner,
            "lr": lr,
            "seconds": seconds,
            "tokens_per_second": stats.tokens / seconds,
            "gossip_wait_seconds": waited,
            "gossip_bytes_sent_by_rank": self.gossip.bytes_sent,
            "loss": stats.loss,
            "targets": stats.targets,
            "tokens": stats.tokens,
            "norm": stats.norm,
            **({"skipped": skipped} if skipped else {}),
        }

    def _compare(self, evaluation: Evaluation, is_through: bool) -> bool:
        """Take note of an evaluation; returns whether the run stops early.

        Saves the checkpoint of the best evaluation before it changes `state.best`: a run that resumes from a checkpoint
        repeats the evaluation of that step. Raises DataError if a key needs a loss and there is none.
        """
        wanted, patience = self.config.checkpoint.best, self.config.evaluation.patience
        loss, sets = evaluation.loss, evaluation.own_sets
        if loss is None:
            if wanted or patience:
                raise DataError(
                    "there is no evaluation set to compare models on",
                    where="checkpoint.best" if wanted else "evaluation.patience",
                    fix="name one in data.evaluation, or hold one out with data.common_holdout or data.client_holdout",
                )
            return False
        if wanted and self.done and best.is_better(self.state.best, loss, sets):
            self.checkpoints.save(best=True)
        found = best.after(self.state.best, self.done, loss, sets)
        if not is_through and best.gives_up(found, patience):
            self.stopped_early = (
                f"{several(found['since'], 'evaluation')} in a row found no lower loss than "
                f"the one after step {found['step']}"
            )
            return True
        self.state.best = found
        return False

    def _evaluate(self) -> Evaluation:
        """Evaluate and log."""
        self.watch.state()
        started, before = time.perf_counter(), peak_memory_bytes(self.client.device)
        scores = self.evaluator.evaluate()
        job: dict[str, Any] = {key: scores.pop(key) for key in JOB_SCORES if key in scores}
        own = scores | {
            "seconds": time.perf_counter() - started,
            "peak_memory_bytes_by_rank_before": before,
            "peak_memory_bytes_by_rank": peak_memory_bytes(self.client.device),
            "gossip_bytes_sent": int(self.client.client_sum(self.gossip.bytes_sent)),
            "gossip_wait_seconds": self.gossip.wait_seconds,
        }
        if self.gossip.skip_log.times:
            own["gossip_skipped"] = {str(j): times for j, times in sorted(self.gossip.skip_log.times.items())}
        self.metrics.evaluation(self.done, own, job)
        return Evaluation.of(self.done, self.cluster.client, own, job)

    def _save(self, state: Mapping[str, Any]) -> None:
        """Write this rank's slices of the trained model, one file per block; `deca export` puts them together.

        state: a manifest from which the run can be continued if it is made longer.
        """
        save_shards(
            self.output / MODEL,
            slice_groups(model_pieces(self.client), self.cluster),
            Part(self.cluster.client, self.cluster.shard, self.cluster.ranks),
            clients=self.cluster.clients,
            step=len(self.schedule),
            state=state,
        )

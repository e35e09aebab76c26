"""The ways to start: anew, from a checkpoint, or as a client that comes back to a job that continues."""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

from rich.console import Console

from deca_ds.algorithm import Schedule
from deca_ds.checkpoint.part import Part
from deca_ds.config import Config, save_config
from deca_ds.config.resume import check_new
from deca_ds.data import ClientData
from deca_ds.elastic import ElasticAgent, Invitation
from deca_ds.engine.client import Client
from deca_ds.engine.state import TrainingState
from deca_ds.gossip import agreement, subset
from deca_ds.launch.compare_ranks import compare_start
from deca_ds.printing import print_wrapped
from deca_ds.run_folder import CLIENT_FAILED, MODEL, SAVED_CONFIG, STOPPED
from deca_ds.training.chosen_method import build_schedule, rule_of
from deca_ds.training.claim import take_for_job
from deca_ds.training.compare_clients import compare_data, digest_of_start
from deca_ds.training.config_warnings import length_warnings
from deca_ds.training.connect import Job
from deca_ds.training.length import check_place, count_rounds, tell_length, tell_other_length
from deca_ds.training.load import forget_base
from deca_ds.training.metrics import Metrics
from deca_ds.training.notices import print_notes
from deca_ds.training.restore import compare_with_saved, restore, rewind, save_summaries
from deca_ds.training.resume import Resumption, keep_model, leave_behind
from deca_ds.training.start_log import record_start
from deca_ds.training.tables import data_table
from deca_ds.transport import gather_json, probe_edges, save_edges


class Start(ABC):
    """What differs between the ways to start. `build` calls the methods in this order, on all ranks that start.

    resumed: inner steps of the checkpoint that the run continues from; None without one. joins: the clients that are
    training already; None where all start together.
    """

    resumed: int | None = None
    joins: Sequence[int] | None = None

    @abstractmethod
    def open_folder(self, job: Job, data: ClientData, vocabulary: str) -> None:
        """Compare the data with the other clients' and, where the run continues, with those before; a new run begins to
        write to its folder. vocabulary: digest of the tokenizer's. Raises UserErrors, before anything is written."""

    @abstractmethod
    def schedule(self, job: Job, client: Client) -> Schedule:
        """Make the schedule of the run, and so its length, which the first rank prints."""

    @abstractmethod
    def compare_models(self, job: Job, client: Client, vocabulary: str) -> None:
        """Raise LaunchError unless the clients start from models that belong together."""

    @abstractmethod
    def attempt(self, job: Job, client: Client) -> int:
        """Return the number of this attempt at the run, the same on all ranks."""

    @abstractmethod
    def restore(self, job: Job, state: TrainingState) -> None:
        """Bring `state`, which is that of a new run, to where this rank's own files let it continue, and note in the
        run's folder that it does. A run that is refused before this, or here, is as if nobody had tried."""

    @abstractmethod
    def join(self, job: Job, agent: ElasticAgent, state: TrainingState, metrics: Metrics) -> None:
        """Become a member of the job, if clients may die, and bring `state` to where the other members are."""


class _Together(Start):
    """Starts all ranks at once."""

    def __init__(self) -> None:
        self._summaries: list[dict[str, Any]] = []  # of the clients' data
        self._edges: list[dict[str, Any]] = []  # see probe_edges

    def open_folder(self, job: Job, data: ClientData, vocabulary: str) -> None:
        """See Start. The edges of the graph are tested, too."""
        cluster, transport = job.cluster, job.transport
        self._summaries = summaries = gather_json(transport, data.summary)
        compare_data(summaries, gather_json(transport, data.label_names))
        neighbours = subset.without(job.mixing, cluster.members.missing).neighbours(cluster.client)
        self._edges = probe_edges(transport, neighbours, cluster.launch, cluster.store)
        self._take(job)
        if cluster.is_job_leader:
            self._describe(job, summaries)
        _tell_notes(job, data)

    def schedule(self, job: Job, client: Client) -> Schedule:
        """See Start. It is logged, too."""
        blocks = len(client.plan.blocks)
        schedule = build_schedule(job.config, blocks, self._count_rounds(job.config, blocks))
        if job.cluster.is_job_leader:
            for line in tell_length(job.config, schedule, self._summaries):
                print_wrapped(line)
        self._check_schedule(job, schedule)
        if job.cluster.is_job_leader:
            for warning in length_warnings(job.config, len(schedule)):
                print_wrapped(f"WARNING: {warning}")
        return schedule

    def attempt(self, job: Job, client: Client) -> int:
        """See Start. The first client's leader draws it."""
        drawn = gather_json(job.transport, secrets.randbits(48))[0]
        return int(client.client_sum(drawn if job.cluster.is_leader else 0))

    def join(self, job: Job, agent: ElasticAgent, state: TrainingState, metrics: Metrics) -> None:
        """See Start."""
        agent.begin(state.done)

    @abstractmethod
    def _take(self, job: Job) -> None:
        """Make the run's folder this job's, unless it is already."""

    @abstractmethod
    def _describe(self, job: Job, summaries: list[dict[str, Any]]) -> None:
        """Write the description of the run, or compare it with the one on disk. summaries: of all clients' data."""

    def _log(self, job: Job, state: TrainingState) -> None:
        """Write how fast the edges are, and that the run has been started."""
        if not job.cluster.is_job_leader:
            return
        if self._edges:
            print_wrapped(save_edges(self._edges, job.output))
        _record(job, state.client, self.resumed or 0, state.schedule.rounds)

    def _count_rounds(self, config: Config, blocks: int) -> int:
        return count_rounds(config, blocks, [summary["train"] for summary in self._summaries])

    @abstractmethod
    def _check_schedule(self, job: Job, schedule: Schedule) -> None:
        """Raise UserErrors if the run cannot continue with this schedule."""


class NewRun(_Together):
    """Starts from the weights of the model."""

    def compare_models(self, job: Job, client: Client, vocabulary: str) -> None:
        """See Start. They are the same model and tokenizer."""
        cluster = job.cluster
        cluster.progress.enter("comparing the models", works=True)
        digests = {"initial parameters": digest_of_start(client, cluster.layout), "tokenizer": vocabulary}
        compare_start(cluster.launch, cluster.store, digests, cluster.ranks if cluster.layout.even else 1)

    def restore(self, job: Job, state: TrainingState) -> None:
        """See Start."""
        rewind(job.output, job.cluster, 0)
        job.cluster.progress.enter("starting", works=True)
        self._log(job, state)

    def _take(self, job: Job) -> None:
        launch, store = job.cluster.launch, job.cluster.store
        take_for_job(job.output, launch, store, partial(check_new, job.config), job.guard.show_life)
        _write_to(job)

    def _describe(self, job: Job, summaries: list[dict[str, Any]]) -> None:
        forget_base(job.output)
        save_config(job.config, job.output / SAVED_CONFIG)
        save_summaries(job.output, summaries)
        Console(stderr=True).print(data_table(summaries, job.config.data.partition_column))
        print_wrapped(f"gossip: {job.mixing.summary()}; {agreement(job.mixing, rule_of(job.config).adds)}")

    def _check_schedule(self, job: Job, schedule: Schedule) -> None:
        """Accept any schedule."""


class ResumedRun(_Together):
    """Continues from a checkpoint; the run's folder was taken when the checkpoint was chosen."""

    def __init__(self, resumption: Resumption, rounds: int):
        """Note what is resumed. rounds: the run's length from here on."""
        super().__init__()
        self.resumption, self.resumed, self._rounds = resumption, resumption.step, rounds
        self._to_save: list[dict[str, Any]] = []  # of the clients' data, on the first rank

    def compare_models(self, job: Job, client: Client, vocabulary: str) -> None:
        """Compare nothing: the checkpoint has each client's own model."""

    def restore(self, job: Job, state: TrainingState) -> None:
        """See Start."""
        output, cluster = job.output, job.cluster
        cluster.progress.enter("reading the checkpoint", works=True)
        restore(self.resumption, cluster, state)
        own, saved = Part(cluster.client, cluster.shard, cluster.ranks), self.resumption.saved
        if saved is not None and saved.folder == output / MODEL:
            keep_model(output, own)
        cluster.progress.enter("starting", works=True)
        cluster.store.gather(cluster.launch, "resume/restored", None)  # on all ranks: nobody refuses the run any more
        leave_behind(job.config, self.resumption, cluster.launch, cluster.store, own)
        _write_to(job)
        rewind(output, cluster, self.resumption.step)
        if cluster.is_job_leader:
            save_summaries(output, self._to_save)
        self._log(job, state)

    def _take(self, job: Job) -> None:
        """Do nothing: see ResumedRun."""

    def _describe(self, job: Job, summaries: list[dict[str, Any]]) -> None:
        self._to_save = compare_with_saved(job.output, summaries)

    def _count_rounds(self, config: Config, blocks: int) -> int:
        return self._rounds

    def _check_schedule(self, job: Job, schedule: Schedule) -> None:
        place = self.resumption.place
        check_place(schedule, place)
        if job.cluster.is_job_leader and len(schedule) != place["of"]:
            print_wrapped(tell_other_length(job.config, schedule, place))


class RejoinedRun(Start):
    """Rejoins as a client that the others continued without, and that they have invited."""

    def __init__(self, invitation: Invitation):
        self._invitation, self.joins = invitation, invitation.clients

    def open_folder(self, job: Job, data: ClientData, vocabulary: str) -> None:
        """See Start."""
        self._invitation.compare_data(data.label_names, data.summary["common_evaluation"], vocabulary)
        _write_to(job)
        _tell_notes(job, data)

    def schedule(self, job: Job, client: Client) -> Schedule:
        """See Start. It is the job's."""
        return build_schedule(job.config, len(client.plan.blocks), self._invitation.rounds)

    def compare_models(self, job: Job, client: Client, vocabulary: str) -> None:
        """Compare nothing: this client takes over a neighbour's model."""

    def attempt(self, job: Job, client: Client) -> int:
        """See Start. It is the job's."""
        return self._invitation.attempt

    def restore(self, job: Job, state: TrainingState) -> None:
        """See Start."""
        rewind(job.output, job.cluster, len(state.schedule))
        job.cluster.progress.enter("starting", works=True)

    def join(self, job: Job, agent: ElasticAgent, state: TrainingState, metrics: Metrics) -> None:
        """See Start. Waits until the job lets this client in, and takes over a neighbour's state."""
        agent.wait_for_admission(state)
        for marker in (CLIENT_FAILED.format(job.cluster.client), STOPPED):
            (job.output / marker).unlink(missing_ok=True)
        rewind(job.output, job.cluster, state.done)  # it may have gone on further than the others
        metrics.reopen()


def _write_to(job: Job) -> None:
    job.output.mkdir(parents=True, exist_ok=True)
    job.guard.write_to(job.output)


def _record(job: Job, client: Client, done: int, rounds: int) -> None:
    cluster = job.cluster
    record_start(
        job.config,
        job.mixing,
        done=done,
        rounds=rounds,
        architecture=type(client.model).__name__,
        parameters=sum(map(prod, client.shapes.values())),
        plan=client.plan,
        ranks=[len(cluster.layout.ranks_of(other)) for other in range(cluster.clients)],
        transport=cluster.transport,
        device=cluster.device,
    )


def _tell_notes(job: Job, data: ClientData) -> None:
    cluster, per_client = job.cluster, bool(job.config.data.per_client)
    if cluster.is_leader and (cluster.is_job_leader or per_client):
        print_notes(data.notes, cluster.client if per_client else None)

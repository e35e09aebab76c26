"""Construct one rank's Trainer, on a connected job whose configuration has been checked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from torch import Tensor
from torch.distributed import PrefixStore
from transformers import PreTrainedTokenizerBase

from deca_ds.data import ClientData, evaluation_batches, training_batches
from deca_ds.elastic import ElasticAgent, Invitation, Lookout, save_addresses
from deca_ds.engine.client import Client
from deca_ds.engine.state import TrainingState
from deca_ds.engine.tokenizer import padding_of
from deca_ds.gossip.clip import Clip
from deca_ds.gossip.codec import CODECS
from deca_ds.gossip.gossip import Gossip
from deca_ds.gossip.late_exchange import LateExchange
from deca_ds.launch.compare_ranks import software
from deca_ds.launch.digests import digest
from deca_ds.launch.view import View
from deca_ds.run_folder import CHECKPOINTS
from deca_ds.training.checkpoints import Checkpoints
from deca_ds.training.chosen_method import rule_of
from deca_ds.training.claim import check_held
from deca_ds.training.completion import Completion, CompletionByCommit, CompletionByStore
from deca_ds.training.connect import Elastic, Job
from deca_ds.training.display import Display
from deca_ds.training.divergence import Watch
from deca_ds.training.evaluation import Evaluator
from deca_ds.training.load import load_base, load_client, load_data, save_base
from deca_ds.training.loop import Trainer
from deca_ds.training.metrics import Metrics
from deca_ds.training.pace import pace_from
from deca_ds.training.ways_to_start import Start
from deca_ds.transport import Commit
from deca_ds.watchdog.lifelines import Lifeline

_TRIED_ROWS = 4  # before training


def build(job: Job, start: Start) -> Trainer:
    """Load tokenizer, data and model, and construct the Trainer; all ranks call this. For a client that comes back, it
    returns when the others have let it in. Raises UserErrors."""
    config, cluster = job.config, job.cluster
    display = Display(config.logging, job.guard.heartbeats.own, lambda: job.guard.stop.pending)
    if cluster.is_job_leader:
        display.show()
    architecture, tokenizer = load_base(job)
    vocabulary, pad_id = _digest_of_vocabulary(tokenizer), padding_of(tokenizer)
    data = load_data(job, architecture, tokenizer)
    cluster.progress.enter("comparing the data")
    start.open_folder(job, data, vocabulary)
    client = load_client(job, architecture)
    schedule = start.schedule(job, client)
    few = data.train.select(range(min(_TRIED_ROWS, len(data.train))))
    first, *others = evaluation_batches(few, batch_size=1, rank=0, ranks=1, pad_id=pad_id)
    client.check_loss(first, others)
    start.compare_models(job, client, vocabulary)
    attempt = start.attempt(job, client)
    gossip = _make_gossip(job, client, attempt)
    state = TrainingState(client, rule_of(config), schedule, gossip)
    start.restore(job, state)
    if cluster.is_job_leader:
        save_base(job, client, tokenizer)
    metrics = Metrics(config.logging, cluster, job.output, schedule, display)
    completion: Completion
    if job.elastic is None:
        agent, completion = None, CompletionByStore(cluster, attempt, config.cluster.timeout_s)
    else:
        completion = CompletionByCommit(job.elastic.commit, start.resumed, config.cluster.absent)
        # before the agent announces which clients have gone, because these may ask to come back at once
        _invite_others(job, job.elastic, attempt, data, vocabulary, schedule.rounds)
        agent = _make_agent(job, job.elastic, gossip, metrics)
        start.join(job, agent, state, metrics)
        job.guard.let_others_go_on()
    watch = Watch(client, cluster, state.rule.buffers)
    display.begin(schedule, state.done, pace_from(schedule, state.done, config.evaluation.every))
    return Trainer(
        config=config,
        cluster=cluster,
        state=state,
        gossip=gossip,
        batches=_make_batches(job, data, pad_id, state.done),
        evaluator=_make_evaluator(job, client, gossip, data, pad_id, display),
        metrics=metrics,
        checkpoints=_make_checkpoints(job, state, gossip, completion, watch, attempt, start.resumed),
        stop=job.guard.stop,
        watch=watch,
        output=job.output,
        agent=agent,
    )


def _digest_of_vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    return digest([json.dumps(sorted(tokenizer.get_vocab().items())).encode()])


def _make_gossip(job: Job, client: Client, attempt: int) -> Gossip:
    """Make the averaging with neighbours. With gossip.wait_s it gets a connection of its own to the job's store."""
    config, cluster = job.config, job.cluster
    radius = config.gossip.clip_radius
    late = None
    if config.gossip.wait_s is not None:
        store = PrefixStore(f"late/{attempt}/{cluster.shard}", cluster.store.reconnect())
        late = LateExchange(job.transport, store, config.gossip.wait_s)
    return Gossip(
        job.transport,
        job.mixing,
        config.gossip.chunk_mib,
        cluster.device,
        codec=CODECS[config.gossip.wire],
        commit=Commit() if job.elastic is None else job.elastic.commit,
        clip=None if radius is None else Clip(radius, client.client_sum),
        late=late,
        client_sum=client.client_sum,
        reports=cluster.is_leader,
    )


def _invite_others(job: Job, elastic: Elastic, attempt: int, data: ClientData, vocabulary: str, rounds: int) -> None:
    """Keep up to date, over torch, what a client that comes back finds in the folder, and what this client's
    coordinator tells it. vocabulary: digest of the tokenizer's vocabulary. rounds: of the run."""
    config, guard = job.config, job.guard
    if elastic.rejoinable is None or not job.cluster.is_leader:
        return
    votes = elastic.rejoinable.votes
    told = {
        "attempt": attempt,
        "software": software(config, [matrix.tobytes() for matrix in job.mixing.matrices]),
        "tokenizer": vocabulary,
        "label_names": data.label_names,
        "common_evaluation": data.summary["common_evaluation"],
        "rounds": rounds,
        "date": config.data.date,
    }

    def invite(*_: View) -> None:
        save_addresses(job.output, votes.addresses)
        store = guard.store.address
        if votes.own is not None and store is not None:
            addresses = [(client, *address) for client, address in votes.addresses.items()]
            votes.own.invite(Invitation(store, guard.site.host, addresses, **told).text())

    invite()
    job.cluster.membership.subscribe(invite)


def _make_agent(job: Job, elastic: Elastic, gossip: Gossip, metrics: Metrics) -> ElasticAgent:
    """Make the agent that lets the others continue when clients die. From here on a dying rank ends its client."""
    cluster, config = job.cluster, job.config.cluster
    assert cluster.client_store is not None, "`connect` opens it"
    lifeline = Lifeline(cluster.client_store, cluster.shard, cluster.ranks, config.timeout_s, job.guard.fail)
    job.guard.on_exit(lifeline.close)
    lookout = None
    if elastic.rejoinable is not None and cluster.is_leader and config.return_s:
        lookout = Lookout(cluster.membership, elastic.rejoinable.votes, cluster.client, config.min_clients)
    return ElasticAgent(
        config=config,
        cluster=cluster,
        commit=elastic.commit,
        rejoinable=elastic.rejoinable,
        gossip=gossip,
        mixing=job.mixing,
        metrics=metrics,
        stop=elastic.stop,
        lookout=lookout,
    )


def _make_batches(job: Job, data: ClientData, pad_id: int, done: int) -> Iterator[list[dict[str, Tensor]]]:
    """Make this rank's part of the batches that follow after `done` inner steps."""
    config, cluster = job.config, job.cluster
    return training_batches(
        data.train,
        batch_size=config.data.batch_size,
        micro_batch_size=config.data.micro_batch_size,
        rank=cluster.shard,
        ranks=cluster.ranks,
        seed=config.run.seed,
        client=cluster.client,
        pad_id=pad_id,
        start_step=done,
    )


def _make_evaluator(
    job: Job, client: Client, gossip: Gossip, data: ClientData, pad_id: int, display: Display
) -> Evaluator:
    config = job.config.evaluation
    return Evaluator(
        client=client,
        cluster=job.cluster,
        transport=job.transport,
        commit=gossip.commit,
        data=data,
        batch_size=config.batch_size,
        pad_id=pad_id,
        mean_model=config.mean_model,
        scored=display.scored,
    )


def _make_checkpoints(
    job: Job,
    state: TrainingState,
    gossip: Gossip,
    completion: Completion,
    watch: Watch,
    attempt: int,
    resumed: int | None,
) -> Checkpoints:
    return Checkpoints(
        job.config.checkpoint,
        job.cluster,
        state,
        gossip,
        completion,
        folder=job.output / CHECKPOINTS,
        attempt=attempt,
        timeout_s=job.config.cluster.timeout_s,
        resumed=resumed,
        check=partial(_check_before_saving, watch, job.output),
    )


def _check_before_saving(watch: Watch, output: Path) -> None:
    """Raise an error if the run's folder is no longer this job's, or if the state is not finite."""
    check_held(output)
    watch.state()

"""Make all that one rank trains with, on a connected job whose configuration has been checked."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from math import prod
from pathlib import Path

import torch
from datasets import disable_progress_bars
from rich.console import Console
from torch.distributed import PrefixStore
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from deca_ds.algorithm.blocks import fused_parameters
from deca_ds.algorithm.methods import METHODS
from deca_ds.checkpoint.adapters import save_adapters
from deca_ds.checkpoint.generation import save_generation_config
from deca_ds.checkpoint.steps import FOLDER as CHECKPOINTS
from deca_ds.config import Config
from deca_ds.data import ClientData, evaluation_batches, training_batches
from deca_ds.data.checks import tell_files
from deca_ds.engine.adapters import find_adapters
from deca_ds.engine.check_model import check_model, check_token_ids
from deca_ds.engine.client import Client
from deca_ds.engine.load import load_architecture, load_model, load_tokenizer
from deca_ds.engine.state import TrainingState
from deca_ds.gossip.clip import Clip
from deca_ds.gossip.codec import CODECS
from deca_ds.gossip.gossip import Gossip
from deca_ds.gossip.schedule import build_mixing
from deca_ds.gossip.stragglers import LateExchange
from deca_ds.launch import Cluster
from deca_ds.launch.digests import digest
from deca_ds.launch.progress import SHARED
from deca_ds.training.checkpoints import Checkpoints
from deca_ds.training.claim import check_held
from deca_ds.training.completion import Agreed, StoreCount, Written
from deca_ds.training.connect import Connected
from deca_ds.training.display import Display
from deca_ds.training.divergence import Watch
from deca_ds.training.doubts import doubts, doubts_of_length
from deca_ds.training.elastic import enter_elastic, invite_others, make_agent
from deca_ds.training.evaluation import Evaluator
from deca_ds.training.loop import Trainer
from deca_ds.training.method import build_rule
from deca_ds.training.metrics import Metrics
from deca_ds.training.pace import pace_from
from deca_ds.training.prepare import first_of_host, load_shared
from deca_ds.training.start import Job, NewRun, Start
from deca_ds.training.starts import record_start
from deca_ds.training.tables import warn_of_blocks, warn_of_experts
from deca_ds.watchdog.guard import JobGuard


def build(
    config: Config, cluster: Cluster, connected: Connected, guard: JobGuard, start: Start | None = None
) -> Trainer:
    """Everything that `Trainer` needs; all ranks call this. start: None is a new run. A client that comes back returns
    when the others have let it in."""
    start, transport = start or NewRun(), connected.transport
    display = Display(config.logging, guard.heartbeats.own)
    if cluster.is_job_leader:
        display.show()
    job = Job(config, cluster, transport, guard, build_mixing(config.gossip, cluster.clients, config.run.seed))
    elastic = enter_elastic(job, connected)
    architecture, tokenizer = _load_tokenizer(job, start.ranks(cluster))
    data = _load_data(job, architecture, tokenizer)
    vocabulary = digest([json.dumps(sorted(tokenizer.get_vocab().items())).encode()])
    cluster.progress.enter("comparing the data")
    start.open_folder(job, data, vocabulary)
    client = _load_client(job, architecture, tokenizer)
    schedule, rule = start.schedule(job, len(client.plan.blocks)), build_rule(config)
    if cluster.is_job_leader:
        _record_start(job, client, start.resumed or 0, schedule.rounds)
        for warning in doubts_of_length(config, len(schedule)):
            print(f"WARNING: {warning}", file=sys.stderr, flush=True)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    one_row = evaluation_batches(data.train.select(range(1)), batch_size=1, rank=0, ranks=1, pad_id=pad_id)
    client.check_loss(next(one_row))
    start.compare_models(job, client, vocabulary)
    attempt = start.attempt(job, client)
    gossip = _make_gossip(job, connected, client, attempt)
    state = TrainingState(client, rule, schedule, gossip)
    start.restore(job, state)
    metrics = Metrics(config.logging, cluster, job.output, schedule, display)
    written: Written = StoreCount(cluster, attempt, config.cluster.timeout_s)
    agent = None
    if elastic is not None:
        written = Agreed(elastic.commit, start.resumed, config.cluster.absent)
        # before the agent, which tells who has gone: that client may ask to come back at once
        invite_others(job, elastic, attempt, data, vocabulary, schedule.rounds)
        agent = make_agent(job, elastic, gossip, metrics)
        start.join(job, agent, state, metrics)
        guard.let_others_go_on()
    watch = Watch(client, cluster, rule.buffers)
    checkpoints = Checkpoints(
        config.checkpoint,
        cluster,
        state,
        gossip,
        written,
        folder=job.output / CHECKPOINTS,
        attempt=attempt,
        timeout_s=config.cluster.timeout_s,
        resumed=start.resumed,
        check=partial(_check_before_saving, watch, job.output),
    )
    batches = training_batches(
        data.train,
        batch_size=config.data.batch_size,
        micro_batch_size=config.data.micro_batch_size,
        rank=cluster.shard,
        ranks=cluster.ranks,
        seed=config.run.seed,
        client=cluster.client,
        pad_id=pad_id,
        start_step=state.done,
    )
    evaluation = config.evaluation
    display.begin(schedule, state.done, pace_from(schedule, state.done, evaluation.every))
    return Trainer(
        config=config,
        cluster=cluster,
        state=state,
        gossip=gossip,
        batches=batches,
        evaluator=Evaluator(
            client,
            cluster,
            transport,
            gossip.commit,
            data,
            evaluation.batch_size,
            pad_id,
            evaluation.mean_model,
            display.scored,
        ),
        metrics=metrics,
        checkpoints=checkpoints,
        stop=guard.stop,
        watch=watch,
        output=job.output,
        agent=agent,
    )


def _load_tokenizer(job: Job, ranks: Sequence[int]) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """The model's configuration and the tokenizer, which fit each other. ranks: those that load them now."""
    model, cluster = job.config.model, job.cluster
    disable_progress_bars()
    cluster.progress.enter("loading the tokenizer", works=True, awaits=SHARED)
    with first_of_host(model, cluster.launch, cluster.store, ranks):
        architecture, tokenizer = load_architecture(model), load_tokenizer(model)
        cluster.progress.enter("checking the model", works=True, awaits=SHARED)
        warnings = check_model(job.config, architecture, tokenizer)
    for warning in [*doubts(job.config), *warnings] if cluster.is_job_leader else ():
        print(f"WARNING: {warning}", file=sys.stderr, flush=True)
    return architecture, tokenizer


def _load_data(job: Job, architecture: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> ClientData:
    """This client's data, of which the model knows all tokens."""
    config, cluster = job.config, job.cluster
    cluster.progress.enter("reading the data", works=True, awaits=SHARED)
    for line in [
        *(tell_files(config.data) if cluster.is_job_leader else ()),
        *(tell_files(config.data, cluster.client) if cluster.is_leader else ()),  # on this client's own output
    ]:
        print(line, file=sys.stderr, flush=True)
    data = load_shared(config, tokenizer, cluster)
    check_token_ids(architecture, data.train, data.own_evaluation, data.common_evaluation)
    return data


def _load_client(job: Job, architecture: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> Client:
    """The model on this client's shards; what Hugging Face needs beside its weights is in the run's folder then."""
    config, cluster, folder = job.config, job.cluster, job.output / "hf"
    cluster.progress.enter("loading the model", works=True, awaits=SHARED)
    model = load_model(config, architecture)
    if cluster.is_job_leader:
        if METHODS[config.algorithm.method].adapters:
            save_adapters(job.output, find_adapters(model))
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if model.can_generate() and (note := save_generation_config(model, tokenizer, folder)):
            print(f"NOTE: {note}", file=sys.stderr, flush=True)
    torch.manual_seed(config.run.seed + cluster.launch.rank)  # dropout: the same in every run, different on every rank
    client = Client(config, model, cluster.device)
    if cluster.is_job_leader:
        console = Console(stderr=True)
        warn_of_blocks(console, client.plan)
        warn_of_experts(console, fused_parameters(client.model), config.model.gradient_checkpointing)
    return client


def _record_start(job: Job, client: Client, done: int, rounds: int) -> None:
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


def _make_gossip(job: Job, connected: Connected, client: Client, attempt: int) -> Gossip:
    """The averaging with neighbours; where late ones are left out, on a connection of its own to the job's store."""
    config, cluster, transport = job.config, job.cluster, connected.transport
    radius = config.gossip.clip_radius
    stragglers = None
    if config.gossip.wait_s is not None:
        store = PrefixStore(f"late/{attempt}/{cluster.shard}", cluster.store.reconnect())
        stragglers = LateExchange(transport, store, config.gossip.wait_s)
    return Gossip(
        transport,
        job.mixing,
        config.gossip.chunk_mib,
        cluster.device,
        codec=CODECS[config.gossip.wire],
        commit=connected.commit,
        clip=None if radius is None else Clip(radius, client.client_sum),
        stragglers=stragglers,
        client_sum=client.client_sum,
        reports=cluster.is_leader,
    )


def _check_before_saving(watch: Watch, output: Path) -> None:
    """Raise an error for a folder that is not ours any more, or a state that must not be saved."""
    check_held(output)
    watch.state()

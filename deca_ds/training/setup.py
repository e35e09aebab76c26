"""Build a run from its configuration, cheapest checks first: nothing is written before everything is known to fit."""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from rich.console import Console
from torch.distributed import PrefixStore

from deca_ds.algorithm.blocks import fused_parameters
from deca_ds.algorithm.methods import METHODS
from deca_ds.checkpoint.adapters import save_adapters
from deca_ds.checkpoint.generation import save_generation_config
from deca_ds.cluster import Cluster, Launch, connect
from deca_ds.cluster.fingerprint import compare_software, compare_start, digest, software
from deca_ds.cluster.guard import JobGuard
from deca_ds.cluster.launch import ClientLayout
from deca_ds.cluster.lifeline import Lifeline
from deca_ds.cluster.lookout import Lookout
from deca_ds.cluster.progress import SHARED
from deca_ds.cluster.stop import StopQuestion
from deca_ds.cluster.store import JobStore
from deca_ds.cluster.visit import Visit, save_addresses
from deca_ds.cluster.votes import Votes
from deca_ds.cluster.world import check_on_failure
from deca_ds.config import Config, save_config
from deca_ds.config.checks import check_world
from deca_ds.config.paths import check_model_folder, check_writable
from deca_ds.config.resume import SAVED_CONFIG, check_folder, check_new, save_optimizer
from deca_ds.data import evaluation_batches, training_batches, validate_data_config
from deca_ds.data.checks import tell_files
from deca_ds.engine.adapters import find_adapters
from deca_ds.engine.check_model import check_model, check_token_ids
from deca_ds.engine.client import Client
from deca_ds.engine.load import load_architecture, load_model, load_tokenizer
from deca_ds.errors import DataError
from deca_ds.gossip import survive
from deca_ds.gossip.edges import probe_edges, save_edges
from deca_ds.gossip.late import check_wait
from deca_ds.gossip.mix import Gossip
from deca_ds.gossip.schedule import build_mixing
from deca_ds.gossip.stragglers import Stragglers
from deca_ds.gossip.surviving import Surviving
from deca_ds.gossip.transport import Transport
from deca_ds.gossip.uneven import UnevenGossip, UnevenTransport
from deca_ds.gossip.voting import VotingTransport
from deca_ds.training.checkpoints import FOLDER as CHECKPOINTS
from deca_ds.training.checkpoints import Checkpoints
from deca_ds.training.claim import take_for_job
from deca_ds.training.connect import connect_transport
from deca_ds.training.day import agree_on_day
from deca_ds.training.evaluation import Evaluator
from deca_ds.training.invite import Invitation
from deca_ds.training.loop import Trainer
from deca_ds.training.method import build_rule, build_schedule, check_method
from deca_ds.training.metrics import Metrics
from deca_ds.training.prepare import first_of_host, load_shared
from deca_ds.training.resume import Resumption, choose, compare_with_saved, restore, rewind, save_summaries
from deca_ds.training.survivors import Survivors
from deca_ds.training.tables import data_table, print_notes, warn_of_blocks, warn_of_experts
from deca_ds.training.whole_digest import whole_digest
from deca_ds.training.written import Agreed, StoreCount, Written


def start(config: Config, launch: Launch, store: JobStore, guard: JobGuard, visit: Visit | None = None) -> Trainer:
    """Check the configuration, join the other ranks and build the run, or what is left of it. Raises UserErrors, before
    anything is written; only the model's come after the output folder is made. visit: of a client that comes back."""
    mixing = build_mixing(config.gossip, config.cluster.clients, config.run.seed)
    matrices = [matrix.tobytes() for matrix in mixing.matrices]
    invitation = None if visit is None else Invitation.read(visit.invitation)
    guard.progress.enter("comparing the ranks")
    if invitation is None:
        compare_software(config, launch, store, matrices)
        agree_on_day(config, launch, store)
    else:
        config.data.date = config.data.date or invitation.date
        invitation.compare_software(config, launch, software(config, matrices))
        store = JobStore(
            PrefixStore(f"visit/{invitation.visit}", store.store), store.address, store.timeout, guard.progress
        )
    guard.progress.enter("checking the configuration")
    layout = ClientLayout.of(check_world(config, launch.world_size))
    guard.progress.watch(layout, config.cluster.timeout_s)
    check_method(config)
    check_wait(config.gossip.wait_s, mixing)
    survive.check_absent(config.cluster, mixing)
    check_on_failure(config, launch, edges=any(mixing.sends(t) for t in range(mixing.period)))
    # other hosts have not got the run's configuration
    if visit is None and (config.run.resume == "never" or launch.rank == launch.first):
        check_folder(config)
    else:
        check_writable(Path(config.run.output), "run.output")
    check_model_folder(config.model)
    validate_data_config(config, client=layout.client_of(launch.rank))
    resumption = None
    if visit is None and config.run.resume != "never":
        output = Path(config.run.output)
        begun = store.gather(launch, "output/begun", (output / SAVED_CONFIG).is_file())[launch.first]
        if begun:
            take_for_job(output, launch, store, partial(check_folder, config))
            if launch.rank == launch.first and (changed := save_optimizer(config)):
                print(f"going on with {changed}", file=sys.stderr, flush=True)
        guard.progress.enter("verifying the checkpoints", works=True)
        resumption = choose(config, launch, store, layout, mixing)
        if begun:  # how the run had ended before is no longer told there
            guard.write_to(output)
    cluster = connect(config, launch, store, guard.progress, joins=visit is not None)
    if invitation is not None:
        cluster.members.clients = tuple(invitation.clients)
    return build(config, cluster, connect_transport(config, cluster, guard, visit), guard, resumption, invitation)


def build(
    config: Config,
    cluster: Cluster,
    transport: Transport,
    guard: JobGuard,
    resumption: Resumption | None = None,
    invitation: Invitation | None = None,
) -> Trainer:
    """Everything `Trainer` needs, on every rank of a connected job. The configuration has been checked.

    resumption: what to go on from; None: a new run. invitation: for a client that comes back; it returns when that has
    been let in.
    """
    resumption = resumption or Resumption()
    progress, launch, output = cluster.progress, cluster.launch, Path(config.run.output)
    mixing = build_mixing(config.gossip, cluster.clients, config.run.seed)
    disable_progress_bars()
    progress.enter("loading the tokenizer", works=True, awaits=SHARED)
    together = launch.ranks if invitation is None else cluster.layout.ranks_of(cluster.client)
    with first_of_host(config.model, launch, cluster.store, together):
        architecture, tokenizer = load_architecture(config.model), load_tokenizer(config.model)
        progress.enter("checking the model", works=True, awaits=SHARED)
        warnings = check_model(config, architecture, tokenizer)
    for warning in warnings if cluster.is_main else ():
        print(f"WARNING: {warning}", file=sys.stderr, flush=True)
    progress.enter("reading the data", works=True, awaits=SHARED)
    for line in [
        *(tell_files(config.data) if cluster.is_main else ()),
        *(tell_files(config.data, cluster.client) if cluster.is_leader else ()),  # on this client's own output
    ]:
        print(line, file=sys.stderr, flush=True)
    data = load_shared(config, tokenizer, cluster)
    check_token_ids(architecture, data.train, data.own_evaluation, data.common_evaluation)
    vocabulary = digest([json.dumps(sorted(tokenizer.get_vocab().items())).encode()])
    progress.enter("comparing the data")
    if invitation is None:
        summaries = transport.gather_json(data.summary)
        compare_data(summaries, transport.gather_json(data.label_names))
        there = survive.without(mixing, cluster.members.missing)
        edges = probe_edges(transport, there, launch, cluster.layout, cluster.store)
    else:
        invitation.compare_data(data.label_names, data.summary["common_evaluation"], vocabulary)
    if invitation is None and resumption.saved is None:
        take_for_job(output, launch, cluster.store, partial(check_new, config))
    output.mkdir(parents=True, exist_ok=True)
    guard.write_to(output)
    if cluster.is_main and resumption.saved is not None:
        compare_with_saved(output, summaries)
    elif cluster.is_main:
        save_config(config, output / "config.yaml")
        save_summaries(output, summaries)
        Console(stderr=True).print(data_table(summaries), mixing.summary())
    if cluster.is_leader and (cluster.is_main or config.data.per_client):
        print_notes(data.notes, cluster.client if config.data.per_client else None)
    if cluster.is_main and edges:
        print(save_edges(edges, output), file=sys.stderr, flush=True)

    progress.enter("loading the model", works=True, awaits=SHARED)
    model = load_model(config, architecture)
    if cluster.is_main:
        if METHODS[config.algorithm.method].adapters:
            save_adapters(output, find_adapters(model))
        model.config.save_pretrained(output / "hf")
        tokenizer.save_pretrained(output / "hf")
        if model.can_generate() and (note := save_generation_config(model, tokenizer, output / "hf")):
            print(f"NOTE: {note}", file=sys.stderr, flush=True)
    torch.manual_seed(config.run.seed + cluster.launch.rank)  # dropout: the same in every run, different on every rank
    client = Client(config, model, cluster.device)
    if cluster.is_main:
        console = Console(stderr=True)
        warn_of_blocks(console, client.plan)
        warn_of_experts(console, fused_parameters(client.model), config.model.gradient_checkpointing)
    schedule = build_schedule(config, len(client.plan.blocks))
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    one_row = evaluation_batches(data.train.select(range(1)), batch_size=1, rank=0, ranks=1, pad_id=pad_id)
    client.check_loss(next(one_row))
    if resumption.saved is None and invitation is None:
        progress.enter("comparing the models", works=True)
        even = cluster.layout.even  # else digests are of whole clients, and all ranks have the same
        starts_from = {"initial parameters": _initial(client) if even else whole_digest(client)}
        compare_start(launch, cluster.store, starts_from | {"tokenizer": vocabulary}, cluster.ranks if even else 1)
    if invitation is None:  # every attempt at the run has a number, which the first client's leader draws for all
        attempt = transport.gather_json(secrets.randbits(48))[0]
        attempt = int(client.client_sum(attempt if cluster.is_leader else 0))
    else:
        attempt = invitation.attempt
    make_gossip: Callable[..., Gossip] = Gossip
    if isinstance(transport, UnevenTransport):
        messages = len(METHODS[config.algorithm.method].rule.travels)
        make_gossip = partial(UnevenGossip, numels=client.block_numels, messages=messages)
    gossip = make_gossip(
        transport,
        mixing,
        config.gossip.chunk_mib,
        cluster.device,
        clip_radius=config.gossip.clip_radius,
        client_sum=client.client_sum,
        stragglers=_stragglers(config, cluster, transport, attempt),
    )
    gossip.attendance.speaks = cluster.is_leader
    rule = build_rule(config)
    rewind(output, cluster, resumption.step if invitation is None else len(schedule))
    progress.enter("reading the checkpoint" if resumption.saved else "starting", works=True)
    state, done = restore(resumption, cluster, client, rule, schedule, gossip), resumption.step
    resumed = resumption.step if resumption.saved is not None else None
    metrics = Metrics(config.logging, cluster, output, len(schedule))
    written: Written = StoreCount(cluster, attempt, config.cluster.timeout_s)
    survivors = None
    way = transport.ranks if isinstance(transport, UnevenTransport) else transport
    if isinstance(way, Surviving):
        written = Agreed(way, resumed, config.cluster.absent)
        guard.stop = StopQuestion()
        survivors = Survivors(config.cluster, cluster, client, way, gossip, mixing, metrics, guard, guard.stop)
        lifeline = Lifeline(cluster.client_store, cluster.shard, cluster.ranks, config.cluster.timeout_s, guard.fail)
        guard.farewells.append(lifeline.close)
        if isinstance(way, VotingTransport) and cluster.is_leader:
            survivors.invite = partial(
                invite,
                way.votes,
                output,
                guard,
                attempt=attempt,
                software=software(config, [matrix.tobytes() for matrix in mixing.matrices]),
                tokenizer=vocabulary,
                label_names=data.label_names,
                common_evaluation=data.summary["common_evaluation"],
                date=config.data.date,
            )
            survivors.invite()
            if config.cluster.return_s:
                survivors.lookout = Lookout(way.votes, cluster.client, config.cluster.min_clients)
        if invitation is None:
            survivors.begin(done)
        else:
            standing = survivors.enter(rule, schedule)
            for marker in (f"FAILED_client_{cluster.client:03d}", "STOPPED"):
                (output / marker).unlink(missing_ok=True)
            state, done = standing.state, standing.done
            rewind(output, cluster, done)  # where it was cut off, it may have gone on further than the others
            metrics.reopen()
            torch.manual_seed(torch.initial_seed() + (done << 32))
        guard.let_others_go_on()
    return Trainer(
        config=config,
        cluster=cluster,
        client=client,
        rule=rule,
        schedule=schedule,
        gossip=gossip,
        batches=training_batches(
            data.train,
            batch_size=config.data.batch_size,
            micro_batch_size=config.data.micro_batch_size,
            rank=cluster.shard,
            ranks=cluster.ranks,
            seed=config.run.seed,
            client=cluster.client,
            pad_id=pad_id,
            start_step=done,
        ),
        evaluator=Evaluator(
            client, cluster, transport, data, config.evaluation.batch_size, pad_id, config.evaluation.mean_model
        ),
        metrics=metrics,
        checkpoints=Checkpoints(
            config.checkpoint,
            cluster,
            client,
            schedule,
            gossip,
            written,
            folder=output / CHECKPOINTS,
            attempt=attempt,
            timeout_s=config.cluster.timeout_s,
            resumed=resumed,
        ),
        stop=guard.stop,
        output=output,
        done=done,
        state=state,
        survivors=survivors,
    )


def invite(votes: Votes, output: Path, guard: JobGuard, **told: Any) -> None:
    """Bring up to date what a client that comes back finds in `output`, and is told by this rank's coordinator."""
    save_addresses(output, votes.addresses)
    if votes.own is not None and guard.store.address is not None:
        addresses = [(client, *address) for client, address in votes.addresses.items()]
        votes.own.invitation = Invitation(guard.store.address, guard.host, addresses, **told).text()


def _stragglers(config: Config, cluster: Cluster, transport: Transport, attempt: int) -> Stragglers | None:
    """What leaves out late neighbours, if that is wanted; on a connection of its own to the job's store."""
    if config.gossip.wait_s is None:
        return None
    store = PrefixStore(f"late/{attempt}/{cluster.shard}", cluster.store.reconnect())
    return Stragglers(transport, store, config.gossip.wait_s)


def _initial(client: Client) -> str:
    """Digest of the initial parameters and buffers that this rank holds."""
    names = tuple(name for block in client.plan.blocks for name in block.names) + client.plan.frozen
    held = [values for *_, values in (*client.shards(names), *client.low_bits(names), *client.buffers())]
    return digest(_memory(values) for values in held)


def _memory(values: torch.Tensor) -> memoryview:
    """The memory of a tensor, on the host."""
    flat = values.detach().cpu().contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def compare_data(summaries: Sequence[dict[str, Any]], label_names: Sequence[list[str]]) -> None:
    """Raise DataError unless all clients number the same labels alike and hold equally large common evaluation sets."""
    first = summaries[0]["client"]
    for summary, names in zip(summaries, label_names, strict=True):
        client = summary["client"]
        if names != label_names[0]:
            raise DataError(
                f"client {first} has the labels {label_names[0]}, client {client} has {names}",
                where="data.label_names",
                fix="name all labels in data.label_names, so that every client knows the same ones",
            )
        if summary["common_evaluation"] != summaries[0]["common_evaluation"]:
            raise DataError(
                f"the common evaluation set has {summaries[0]['common_evaluation']} examples at client {first} and "
                f"{summary['common_evaluation']} at client {client}",
                where="data.evaluation",
                fix="give every client the same files",
            )

"""What a run would do: blocks, graph, data and steps, without loading weights or starting anything."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from transformers import PreTrainedModel

from deca_ds.algorithm.blocks import BlockPlan, fused_parameters
from deca_ds.algorithm.schedule import Schedule
from deca_ds.config import Config
from deca_ds.config.checks import check_world, is_used
from deca_ds.config.resume import check_folder
from deca_ds.data import load_all, validate_data_config
from deca_ds.data.checks import tell_files
from deca_ds.elastic.policy import check_absent
from deca_ds.engine.adapters import add_adapters
from deca_ds.engine.check_model import check_model
from deca_ds.engine.load import find_blocks, load_architecture, load_tokenizer, meta_model
from deca_ds.engine.output_head import find_head
from deca_ds.gossip import subset
from deca_ds.gossip.codec import CODECS
from deca_ds.gossip.late import check_wait
from deca_ds.gossip.schedule import MixingSchedule, build_mixing
from deca_ds.gossip.theory import averagings_to_agree, slow_mixing
from deca_ds.launch.hostfile import hosts_of_clients, read_hostfile
from deca_ds.launch.launcher import ClientLayout
from deca_ds.tools.disk import DiskNeed, Stored, disk_need, taken
from deca_ds.training.compare import compare_data
from deca_ds.training.doubts import doubts
from deca_ds.training.length import ANY_ROUNDS, count_rounds, tell_length
from deca_ds.training.method import build_rule, build_schedule, check_method
from deca_ds.training.tables import block_table, data_table, print_notes, warn_of_blocks, warn_of_experts

_USUAL_WEIGHT_SCALE = 0.02  # initializer_range of most architectures, for the few that name none


def print_plan(config: Config, world_size: int | None = None, hostfile: Path | None = None) -> None:
    """Check the whole configuration and print the plan on stdout. Raises the UserErrors that the run itself would.

    world_size: ranks launched, or None where the plan is made by a process of its own. hostfile: what the launcher will
    get, which then tells how many ranks there will be. With data.per_client only the configuration of the data is
    checked, because each client's files are for its own ranks to open.
    """
    console = Console()
    disable_progress_bars()
    slots = None if hostfile is None else read_hostfile(hostfile)
    if slots is not None:
        world_size = sum(slots.values())
    if world_size is None and config.cluster.ranks is not None:
        world_size = sum(config.cluster.ranks)
    ranks = check_world(config, world_size) if world_size else None
    check_method(config)
    clients = config.cluster.clients
    validate_data_config(config, client=None)
    mixing = build_mixing(config.gossip, clients, config.run.seed)
    check_wait(config.gossip.wait_s, mixing)
    check_absent(config.cluster, mixing)
    architecture, tokenizer = load_architecture(config.model), load_tokenizer(config.model)
    for warning in [*doubts(config), *check_model(config, architecture, tokenizer, weights=False)]:
        console.print(f"[bold]WARNING[/bold]: {escape(warning)}", highlight=False)
    model = meta_model(config.model, architecture)
    add_adapters(config, model)
    plan = find_blocks(config, model)
    console.print(block_table(plan, min(ranks) if ranks else 1, build_rule(config).bytes_per_parameter))
    warn_of_blocks(console, plan)
    warn_of_experts(console, fused_parameters(model), config.model.gradient_checkpointing)
    if config.model.dtype == "bfloat16":
        console.print(_masters(config.model.masters, plan, min(ranks) if ranks else 1), highlight=False)
    if find_head(model) is None:
        console.print(_all_logits(config, model), highlight=False)
    console.print(f"gossip: {mixing.summary()}; {_agreement(mixing)}")
    if mixing.messages:
        console.print(_traffic(config, plan), highlight=False)
    if config.cluster.absent:
        without = subset.without(mixing, config.cluster.absent)
        gap = subset.spectral_gap(without, [c for c in range(clients) if c not in config.cluster.absent])
        absent = ", ".join(map(str, sorted(config.cluster.absent)))
        console.print(f"at the start: client {absent} absent, spectral gap {gap:.4g}", highlight=False)
    scale = getattr(architecture.get_text_config(), "initializer_range", None) or _USUAL_WEIGHT_SCALE
    for warning in slow_mixing(
        mixing,
        inner_steps=config.algorithm.inner_steps,
        gossip_every=config.gossip.every,
        lr=config.optimizer.lr,
        weight_scale=scale,
    ):
        console.print(f"[bold]WARNING[/bold]: {warning}", highlight=False)
    summaries: list[dict[str, Any]] = []
    if config.data.per_client:
        console.print("data: one path per client; each client's ranks open their own only")
    else:
        data = load_all(config, tokenizer)
        for line in tell_files(config.data):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        summaries = [part.summary for part in data]
        compare_data(summaries, [part.label_names for part in data])
        console.print(data_table(summaries))
        print_notes(data[0].notes)
    schedule = _schedule(console, config, len(plan.blocks), summaries)
    stored = Stored.of(model, plan, config.model, build_rule(config))
    _print_disk(console, disk_need(stored, schedule, config.checkpoint), config)
    if ranks is None:
        console.print(
            f"launch: {clients} x k ranks, where data.batch_size is a multiple of k x data.micro_batch_size; "
            "state per rank above is for k = 1"
        )
    elif len(set(ranks)) == 1:
        console.print(f"launch: {world_size} ranks = {clients} clients x {ranks[0]} ranks")
    else:
        named = ", ".join(f"client {client}: {k}" for client, k in enumerate(ranks))
        console.print(
            f"launch: {world_size} ranks of clients of different sizes ({named}); state per rank above is that of "
            f"{min(ranks)} rank{'s' if min(ranks) > 1 else ''} a client"
        )
    if slots is not None and ranks is not None:
        _print_hosts(console, hosts_of_clients(slots, ClientLayout.of(ranks)))
    _check_output(console, config)


def _check_output(console: Console, config: Config) -> None:
    """Last, so that it hides nothing else. A folder that is used refuses a run, not the plan of the next one."""
    if config.run.resume == "never" and is_used(Path(config.run.output)):
        console.print(
            f"[bold]WARNING[/bold]: the output folder '{escape(config.run.output)}' is already used, and a new run is "
            "refused there: name another one in run.output, or set run.resume=require to continue that run",
            highlight=False,
        )
    else:
        check_folder(config)


def _schedule(console: Console, config: Config, blocks: int, summaries: Sequence[Mapping[str, Any]]) -> Schedule:
    """Print how long the run is. summaries: of all clients' data; none where nobody has opened the files."""
    algorithm, batch = config.algorithm, config.data.batch_size
    if summaries or algorithm.rounds is not None:
        rounds = count_rounds(config, blocks, [each["train"] for each in summaries])
        steps = f"{rounds} rounds x {blocks} blocks x {algorithm.inner_steps} inner steps = "
        steps += f"{rounds * blocks * algorithm.inner_steps}"
    else:
        rounds = ANY_ROUNDS
        steps = f"algorithm.epochs={algorithm.epochs:g} of what the clients' files hold, in whole rounds of {blocks} "
        steps += f"blocks x {algorithm.inner_steps} inner steps"
    console.print(f"steps: {steps}, {batch} sequences per client and step", highlight=False)
    schedule = build_schedule(config, blocks, rounds)
    for line in tell_length(config, schedule, summaries) if summaries else ():
        console.print(line, highlight=False, markup=False)
    return schedule


def _print_disk(console: Console, need: DiskNeed, config: Config) -> None:
    """What the run needs, and a warning where this host has less."""
    every, clients = config.checkpoint.every, config.cluster.clients
    how = f"every {every} inner steps, keep {config.checkpoint.keep}"
    how = how if every else "one, at the end or when told to stop"
    console.print(
        f"disk: {decimal(need.most)} a client at most, {decimal(clients * need.most)} in all; of a client the trained "
        f"model takes {decimal(need.model)}, checkpoints ({how}) up to {decimal(need.checkpoints)}",
        highlight=False,
    )
    output = Path(config.run.output).absolute()
    there = next(folder for folder in (output, *output.parents) if folder.exists())
    free = shutil.disk_usage(there).free + taken(output)
    if free < clients * need.most:
        console.print(
            f"[bold]WARNING[/bold]: {decimal(free)} are free at {there} for run.output, less than all clients need. "
            "If they do not all write there, count those that do. Else make room, or lower checkpoint.keep",
            highlight=False,
        )


def _print_hosts(console: Console, hosts: Sequence[Sequence[str]]) -> None:
    """Which client runs where, and a warning where a host is shared by clients that need others as well."""
    for client, names in enumerate(hosts):
        console.print(f"  client {client}: {', '.join(names)}", highlight=False)
    for client, names in enumerate(hosts):
        shared = sorted({name for name in names if len(names) > 1 and sum(name in other for other in hosts) > 1})
        if shared:
            console.print(
                f"[bold]WARNING[/bold]: client {client} is spread over {', '.join(names)}, and others use "
                f"{', '.join(shared)}, too: ZeRO-3 sends far more inside a client than gossip sends between clients. "
                "Order the hosts, or choose their slots, so that clients begin and end with hosts",
                highlight=False,
            )


def _masters(masters: str, plan: BlockPlan, ranks: int) -> str:
    """What the float32 masters of a bfloat16 model cost, or what it costs not to have them."""
    mib = 2 * sum(block.numel for block in plan.blocks) / ranks / 2**20
    if masters == "exact":
        return f"masters: exact, {mib:,.1f} MiB of host memory per rank"
    lost = "what a block's turn changes by less than half a bfloat16's last place is lost when it ends"
    return f"masters: rounded, {lost}; model.masters=exact takes {mib:,.1f} MiB of host memory per rank"


def _all_logits(config: Config, model: PreTrainedModel) -> str:
    """What the loss of a model takes that is not a body and a head."""
    mib = 4 * model.config.get_text_config().vocab_size * config.data.micro_batch_size * config.data.max_length / 2**20
    return (
        f"logits: the forward of {type(model).__name__} is not a body and one linear head, so that the loss holds all "
        f"logits of a micro-batch: {mib:,.1f} MiB in float32, and as much for their gradient"
    )


def _traffic(config: Config, plan: BlockPlan) -> str:
    """What an averaging sends."""
    tensors, codec = len(build_rule(config).travels), CODECS[config.gossip.wire]
    largest = codec.bytes * tensors * max(block.numel for block in plan.blocks)
    each = f" of {tensors} tensors" if tensors > 1 else ""
    return (
        f"traffic: {config.gossip.wire}, {codec.bytes} bytes a parameter{each}; an averaging of the largest block "
        f"sends {decimal(largest)} from a client to each neighbour"
    )


def _agreement(mixing: MixingSchedule) -> str:
    needed = averagings_to_agree(mixing)
    if needed == float("inf"):
        return "clients never agree"
    return f"a disagreement shrinks by 2.7 in {needed:.3g} averaging{'s' if needed != 1 else ''} at most"

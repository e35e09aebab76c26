"""What a run would do: blocks, graph, data, steps and memory, without loading weights or starting anything."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars
from rich.console import Console
from rich.filesize import decimal
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from deca_ds.algorithm import BlockPlan, fused_parameters
from deca_ds.config import Config
from deca_ds.config.checks import check_world
from deca_ds.config.resume import is_used
from deca_ds.elastic import check_absent
from deca_ds.engine.architecture import load_architecture
from deca_ds.engine.check_model import check_model
from deca_ds.engine.output_head import find_head
from deca_ds.engine.tokenizer import load_tokenizer
from deca_ds.errors import ConfigError
from deca_ds.gossip import MixingSchedule, agreement, build_mixing, subset
from deca_ds.gossip.late import check_wait
from deca_ds.launch import ClientLayout
from deca_ds.launch.devices import computes_on_gpu
from deca_ds.launch.hostfile import hosts_of_clients, read_hostfile
from deca_ds.planning.estimate import Estimate, memory_json
from deca_ds.planning.roofline import Gpu, find_gpu, read_rate
from deca_ds.plural import named, several
from deca_ds.printing import print_line
from deca_ds.tools.disk import DiskNeed, Stored, disk_need, taken
from deca_ds.tools.plan_hosts import look_at_hosts
from deca_ds.tools.plan_run import Planned, fault_of_data, print_run
from deca_ds.tools.plan_tables import RunTime, print_fit, print_memory, print_times
from deca_ds.training.chosen_method import check_method, rule_of
from deca_ds.training.config_warnings import config_warnings, gossip_warnings
from deca_ds.training.notices import warn_of_blocks, warn_of_experts
from deca_ds.training.pace import evaluations_left
from deca_ds.training.resume import check_start
from deca_ds.training.tables import block_table
from deca_ds.training.trackers import check_logging

_USUAL_WEIGHT_SCALE = 0.02  # initializer_range of most architectures, for the few that name none


def print_plan(
    config: Config,
    world_size: int | None = None,
    hostfile: Path | None = None,
    *,
    gpu: str | None = None,
    net: str | None = None,
    as_json: bool = False,
    look: bool = False,
    file: Path | None = None,
) -> bool:
    """Check the whole configuration and print the plan on stdout. Raises the UserErrors that the run itself would,
    those about the data last, after all that needs no data.

    world_size: ranks launched, or None where the plan is made by a process of its own. hostfile: what the launcher will
    get, which then tells how many ranks there will be. With data.per_client only the configuration of the data is
    checked, because each client's files are for its own ranks to open. gpu, net: tell the time on such
    GPUs, with a network of that rate in bits a second. as_json: print numbers for programs instead. look: ask every
    host of the hostfile, as the doctor does, whether a launcher could start ranks there, and whether they would find
    their files, `file` with the configuration among them. Returns whether no host lacks anything.
    """
    # mpirun shows its ranks a terminal, also into a file
    console = Console(quiet=as_json, color_system=None if world_size is not None else "auto")
    disable_progress_bars()
    machines = _find_machines(config, world_size, hostfile, gpu, net)
    mixing, fault = _check(config), fault_of_data(config)
    estimate, tokenizer = _print_model(console, config, mixing, machines)
    run = print_run(console, config, estimate, tokenizer, fault, timed=machines.card is not None)
    costs = _print_costs(console, config, estimate, run, machines)
    _print_launch(console, config, machines)
    _check_output(console, config)
    report = look_at_hosts(console, config, machines.slots, file) if look and machines.slots is not None else None
    if as_json:
        print(json.dumps(_numbers(estimate, run, costs) | {"hosts": report}, indent=1))
    if run.fault is not None:
        raise run.fault
    return report is None or report["ok"]


@dataclass(frozen=True)
class _Machines:
    """What the run will be on. slots: host -> ranks, from a hostfile. ranks, hosts: of each client, where they are
    known. card: the GPU with its name, and rate: the network's in bytes a second, where they are asked for."""

    slots: Mapping[str, int] | None
    ranks: Sequence[int] | None
    hosts: Sequence[Sequence[str]] | None
    card: tuple[str, Gpu] | None
    rate: float | None


@dataclass(frozen=True)
class _Costs:
    """What the run costs beside memory. time: on the GPU that was asked for."""

    disk: DiskNeed
    time: RunTime | None


def _numbers(estimate: Estimate, run: Planned, costs: _Costs) -> dict[str, Any]:
    """Return the plan for programs; None for what is not known."""
    time = costs.time
    return {
        "memory": memory_json(estimate),
        "traffic": {k: v for k, v in asdict(run.sent).items() if run.length or not k.startswith("run")},
        "length": None if run.length is None else asdict(run.length),
        "disk": asdict(costs.disk),
        "seconds_of_a_step": None if time is None else asdict(time.step) | {"step": time.step.step},
        "seconds_of_the_run": None if time is None else time.run,
    }


def _find_machines(
    config: Config, world_size: int | None, hostfile: Path | None, gpu: str | None, net: str | None
) -> _Machines:
    """Find the machines by the arguments of `print_plan`."""
    card = None if gpu is None else find_gpu(gpu)
    rate = None if net is None else read_rate(net)
    if card is None and rate is not None:
        raise ConfigError("--net tells nothing without a GPU", where="--net", fix="add --gpu")
    slots = None if hostfile is None else read_hostfile(hostfile)
    ranks = _find_ranks(config, world_size if slots is None else sum(slots.values()))
    hosts = None if slots is None or ranks is None else hosts_of_clients(slots, ClientLayout.of(ranks))
    return _Machines(slots, ranks, hosts, card, rate)


def _find_ranks(config: Config, world_size: int | None) -> list[int] | None:
    """Return the number of ranks of each client; None if it is not known."""
    if world_size is None and config.cluster.ranks is not None:
        world_size = sum(config.cluster.ranks)
    return check_world(config, world_size) if world_size else None


def _check(config: Config) -> MixingSchedule:
    """Check what needs neither model nor data, and return how clients mix."""
    check_method(config)
    check_logging(config.logging)
    mixing = build_mixing(config.gossip, config.cluster.clients, config.run.seed)
    check_wait(config.gossip.wait_s, mixing)
    check_absent(config.cluster, mixing)
    return mixing


def _warn(console: Console, warning: str) -> None:
    print_line(console, f"WARNING: {warning}")


def _print_model(
    console: Console, config: Config, mixing: MixingSchedule, machines: _Machines
) -> tuple[Estimate, PreTrainedTokenizerBase]:
    """Print the model's blocks, what its kind costs, and how its clients mix. Loads no weights."""
    architecture, tokenizer = load_architecture(config.model), load_tokenizer(config.model)
    for warning in [*config_warnings(config), *check_model(config, architecture, tokenizer, weights=False)]:
        _warn(console, warning)
    on_gpu = machines.card is not None or computes_on_gpu(config.run.device)
    estimate = Estimate(config, architecture, mixing, min(machines.ranks) if machines.ranks else 1, on_gpu)
    model, plan = estimate.model, estimate.plan
    console.print(block_table(plan, estimate.ranks, estimate.rule.bytes_per_parameter))
    warn_of_blocks(console, plan)
    warn_of_experts(console, fused_parameters(model, plan.beside), config.model.gradient_checkpointing)
    if config.model.dtype == "bfloat16" and config.model.masters == "rounded":
        print_line(console, _rounded(plan, estimate.ranks))
    if find_head(model) is None:
        print_line(console, _all_logits(config, model))
    _print_gossip(console, config, mixing, architecture)
    return estimate, tokenizer


def _print_gossip(console: Console, config: Config, mixing: MixingSchedule, architecture: PretrainedConfig) -> None:
    """Print the graph, which clients are absent, and whether the graph mixes fast enough."""
    print_line(console, f"gossip: {mixing.summary()}; {agreement(mixing, rule_of(config).adds)}")
    if config.cluster.absent:
        without = subset.without(mixing, config.cluster.absent)
        gap = subset.spectral_gap(without, [c for c in range(mixing.size) if c not in config.cluster.absent])
        absent = named("client", sorted(config.cluster.absent))
        print_line(console, f"at the start: {absent} absent, spectral gap {gap:.4g}")
    scale = getattr(architecture.get_text_config(), "initializer_range", None) or _USUAL_WEIGHT_SCALE
    for warning in gossip_warnings(config, mixing, scale):
        _warn(console, warning)


def _print_costs(console: Console, config: Config, estimate: Estimate, run: Planned, machines: _Machines) -> _Costs:
    """Print the memory of a rank, the time on the GPU that is asked for, and the disk."""
    print_memory(console, estimate)
    time = None
    if machines.card is not None:
        name, gpu = machines.card
        print_fit(console, estimate, name, gpu)
        time = _times(estimate, run, gpu, machines)
        print_times(console, estimate, name, gpu, machines.rate, time)
    else:
        print_line(console, "time: `deca plan` estimates how long steps and the run take with --gpu NAME --net RATE")
    stored = Stored.of(estimate.model, estimate.plan, config.model, estimate.rule)
    disk = disk_need(stored, run.schedule, config.checkpoint)
    _print_disk(console, disk, config)
    return _Costs(disk, time)


def _times(estimate: Estimate, run: Planned, gpu: Gpu, machines: _Machines) -> RunTime:
    on_hosts, evaluation, steps = _on_hosts(machines.hosts), None, None if run.length is None else run.length.steps
    if run.sequences is not None:
        own, common = run.sequences["own"], run.sequences["common"]
        evaluation = estimate.evaluation_time(gpu, machines.rate, *on_hosts, own=own, common=common)
    evaluations = 0 if steps is None else evaluations_left(0, steps, estimate.config.evaluation.every)
    return RunTime(estimate.step_times(gpu, machines.rate, *on_hosts), evaluation, steps, evaluations)


def _check_output(console: Console, config: Config) -> None:
    """Last, so that it hides nothing else. A folder that is used refuses a run, not the plan of the next one."""
    if config.run.resume == "never" and is_used(Path(config.run.output)):
        _warn(
            console,
            f"the output folder '{config.run.output}' is already used, and a new run is "
            "refused there: name another one in run.output, or set run.resume=require to continue that run",
        )
    else:
        check_start(config)


def _print_disk(console: Console, need: DiskNeed, config: Config) -> None:
    """Print the disk that the run needs, and a warning if this host has less."""
    every, clients = config.checkpoint.every, config.cluster.clients
    how = f"every {several(every, 'inner step')}, keep {config.checkpoint.keep}"
    how = how if every else "one, at the end or when told to stop"
    how += ", and the best" * config.checkpoint.best
    print_line(
        console,
        f"disk: {decimal(need.most)} a client at most, {decimal(clients * need.most)} in all; of a client the trained "
        f"model takes {decimal(need.model)}, checkpoints ({how}) up to {decimal(need.checkpoints)}",
    )
    output = Path(config.run.output).absolute()
    there = next(folder for folder in (output, *output.parents) if folder.exists())
    free = shutil.disk_usage(there).free + taken(output)
    if free < clients * need.most:
        _warn(
            console,
            f"{decimal(free)} are free at {there} for run.output, less than all clients need. "
            "If they do not all write there, count those that do. Else make room, or lower checkpoint.keep",
        )


def _print_launch(console: Console, config: Config, machines: _Machines) -> None:
    """Print how many ranks the clients have, and on which hosts."""
    clients, ranks = config.cluster.clients, machines.ranks
    if ranks is None:
        print_line(
            console,
            f"launch: {clients} x k ranks, where data.batch_size is a multiple of k x data.micro_batch_size; "
            "state per rank above is for k = 1",
        )
    elif len(set(ranks)) == 1:
        shape = f"{several(clients, 'client')} x {several(ranks[0], 'rank')}"
        print_line(console, f"launch: {several(sum(ranks), 'rank')} = {shape}")
    else:
        named = ", ".join(f"client {client}: {k}" for client, k in enumerate(ranks))
        print_line(
            console,
            f"launch: {sum(ranks)} ranks of clients of different sizes ({named}); state per rank above is that of "
            f"{several(min(ranks), 'rank')} a client",
        )
    if machines.hosts is not None:
        _print_hosts(console, machines.hosts)


def _print_hosts(console: Console, hosts: Sequence[Sequence[str]]) -> None:
    """Print which client runs where, and a warning if clients that span hosts share one."""
    for client, names in enumerate(hosts):
        print_line(console, f"  client {client}: {', '.join(names)}")
    for client, names in enumerate(hosts):
        shared = sorted({name for name in names if len(names) > 1 and sum(name in other for other in hosts) > 1})
        if shared:
            _warn(
                console,
                f"client {client} is spread over {', '.join(names)}, and others use "
                f"{', '.join(shared)}, too: ZeRO-3 sends far more inside a client than gossip sends between clients. "
                "Order the hosts, or choose their slots, so that clients begin and end with hosts",
            )


def _on_hosts(hosts: Sequence[Sequence[str]] | None) -> tuple[bool, float]:
    """Return whether a client spans hosts, and how many clients' messages one host's network carries. Without a
    hostfile, every client has a host of its own."""
    if hosts is None:
        return False, 1.0
    carried: dict[str, float] = defaultdict(float)
    for names in hosts:
        for name in names:
            carried[name] += 1 / len(names)
    return any(len(names) > 1 for names in hosts), max(carried.values())


def _rounded(plan: BlockPlan, ranks: int) -> str:
    """Say what rounded masters cost a bfloat16 model, and what memory exact ones would take."""
    exact = 2 * sum(block.numel for block in plan.blocks) // ranks
    return (
        "masters: rounded, so changes of less than half a bfloat16's last place are lost when an activation ends; "
        f"model.masters=exact takes {decimal(exact)} of host memory per rank"
    )


def _all_logits(config: Config, model: PreTrainedModel) -> str:
    """Say what the loss takes of a model that is not a body and a head."""
    size = 4 * model.config.get_text_config().vocab_size * config.data.micro_batch_size * config.data.max_length
    return (
        f"logits: the forward of {type(model).__name__} is not a body and one linear head, so that the loss holds all "
        f"logits of a micro-batch: {decimal(size)} in float32, and as much for their gradient"
    )

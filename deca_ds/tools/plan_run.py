"""What a plan says of the run itself: data, length and traffic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from transformers import PreTrainedTokenizerBase

from deca_ds.algorithm import Schedule
from deca_ds.config import Config
from deca_ds.data import load_all, validate_data_config
from deca_ds.data.checks import tell_files
from deca_ds.data.prepare import check_tokenizer
from deca_ds.errors import DataError
from deca_ds.gossip.codec import CODECS
from deca_ds.planning.estimate import Estimate
from deca_ds.planning.traffic import Traffic, traffic
from deca_ds.plural import several
from deca_ds.printing import print_line
from deca_ds.training.chosen_method import build_schedule
from deca_ds.training.compare_clients import compare_data
from deca_ds.training.config_warnings import length_warnings
from deca_ds.training.length import ANY_ROUNDS, Length, count_rounds, length_of, tell_length
from deca_ds.training.notices import print_notes
from deca_ds.training.tables import data_table


@dataclass(frozen=True)
class Planned:
    """What is trained, for how long, and what is sent. schedule: stands for the run's where nobody knows how long that
    is, and length is None. sequences: see `_print_data`. fault: why the data cannot be had."""

    schedule: Schedule
    length: Length | None
    sent: Traffic
    sequences: dict[str, int] | None
    fault: DataError | None


def fault_of_data(config: Config) -> DataError | None:
    """Return why files or names of the hub are not there. Raises ConfigError where the keys contradict each other."""
    try:
        validate_data_config(config, client=None)
    except DataError as error:
        return error
    return None


def print_run(
    console: Console,
    config: Config,
    estimate: Estimate,
    tokenizer: PreTrainedTokenizerBase,
    fault: DataError | None,
    *,
    timed: bool,
) -> Planned:
    """Print data, length and traffic, and return them. fault: see Planned. timed: whether the time is asked for."""
    summaries: list[dict[str, Any]] = []
    sequences: dict[str, int] | None = None
    if fault is None:
        try:
            summaries, sequences = _print_data(console, config, tokenizer)
        except DataError as error:
            fault = error
    if fault is not None:
        print_line(console, f"data: unknown, and so {_unknown(config, timed)}: {fault.what}")
    schedule, length = _print_length(console, config, len(estimate.plan.blocks), summaries)
    messages = [estimate.message_bytes(block.numel) for block in estimate.plan.blocks]
    run = Planned(schedule, length, traffic(messages, schedule, estimate.mixing), sequences, fault)
    if estimate.mixing.messages:
        print_line(console, _traffic(config, estimate, run))
    return run


def _unknown(config: Config, timed: bool) -> str:
    """Say which lines are missing without data."""
    lines = ["what each client gets"]
    if config.algorithm.rounds is None:
        lines.append("the length of the run")
    if timed:
        lines.append("the time of an evaluation")
    return f"{'is' if len(lines) == 1 else 'are'} {' and '.join(lines)}"


def _print_data(
    console: Console, config: Config, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[dict[str, Any]], dict[str, int] | None]:
    """Print the data of all clients. Returns their summaries, and how many sequences the longest `own` and the `common`
    evaluation set have; none if each client's files are for its own ranks to open."""
    if config.data.per_client:
        check_tokenizer(config, tokenizer)
        print_line(console, "data: one path per client; each client's ranks open their own only")
        return [], None
    data = load_all(config, tokenizer)
    for line in tell_files(config.data):
        print_line(console, line)
    summaries = [part.summary for part in data]
    compare_data(summaries, [part.label_names for part in data])
    console.print(data_table(summaries, config.data.partition_column))
    print_notes(data[0].notes)
    sets = {"own": [part.own_evaluation for part in data], "common": [part.common_evaluation for part in data]}
    sequences = {name: max(0 if rows is None else len(rows) for rows in every) for name, every in sets.items()}
    return summaries, sequences


def _print_length(
    console: Console, config: Config, blocks: int, summaries: Sequence[Mapping[str, Any]]
) -> tuple[Schedule, Length | None]:
    """Print how long the run is; see Planned. summaries: of all clients' data; none if the files were not opened."""
    algorithm, batch = config.algorithm, config.data.batch_size
    inner, known = several(algorithm.inner_steps, "inner step"), bool(summaries) or algorithm.rounds is not None
    if known:
        rounds = count_rounds(config, blocks, [each["train"] for each in summaries])
        steps = f"{several(rounds, 'round')} x {several(blocks, 'block')} x {inner} = "
        steps += f"{rounds * blocks * algorithm.inner_steps}"
    else:
        rounds = ANY_ROUNDS
        steps = f"algorithm.epochs={algorithm.epochs:g} of what the clients' files hold, in whole rounds of "
        steps += f"{several(blocks, 'block')} x {inner}"
    print_line(console, f"steps: {steps}, {several(batch, 'sequence')} per client and step")
    schedule = build_schedule(config, blocks, rounds)
    if not known:
        return schedule, None
    warnings = [f"WARNING: {each}" for each in length_warnings(config, len(schedule))]
    for line in [*(tell_length(config, schedule, summaries) if summaries else ()), *warnings]:
        print_line(console, line)
    return schedule, length_of(config, schedule, summaries)


def _traffic(config: Config, estimate: Estimate, run: Planned) -> str:
    """Say how much averagings send."""
    tensors, codec, sent = len(estimate.rule.travels), CODECS[config.gossip.wire], run.sent
    each = f" of {tensors} tensors" if tensors > 1 else ""
    told = (
        f"traffic: {config.gossip.wire}, {codec.bytes} bytes a parameter{each}; an averaging of the largest block "
        f"sends {decimal(sent.averaging)} from a client to each neighbour; on average a step sends "
        f"{decimal(round(sent.edge))} over an edge and {decimal(round(sent.client))} from a client"
    )
    if run.length is not None:
        told += f", the run {decimal(round(sent.run_client))} from a client and {decimal(round(sent.run))} in all"
    return told

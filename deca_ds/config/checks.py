"""Checks of the configuration by itself: values out of range, keys that contradict each other or the number of ranks.
They look at no file."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from deca_ds.config.schema import Config
from deca_ds.errors import ConfigError

_LARGEST = 1e30  # of any number: larger ones, times others, are none in float32


def check(config: Config) -> None:
    """Refuse values that are out of range or contradict each other; raises ConfigError naming the key."""
    _check_finite(config, "")
    check_ranges(config)
    _check_length(config)
    _check_edges(config)
    if config.cluster.ranks is not None:
        _check_ranks(config)
    if config.cluster.absent:
        _check_absent(config)
    _check_failures(config)
    _check_wait(config)
    _check_best(config)
    _check_batch(config)


def check_ranges(config: Config) -> None:
    """Raise ConfigError unless every key has a value that the schema allows."""
    for section in fields(config):
        keys = getattr(config, section.name)
        for field in fields(keys) if is_dataclass(keys) else ():
            value, allowed = getattr(keys, field.name), field.metadata["allowed"]
            if allowed is not None and not allowed.holds(value):
                key = f"{section.name}.{field.name}"
                raise ConfigError(f"{key} = {value!r} is out of range", where=key, fix=f"make it {allowed.words}")


def check_names(config: Config, registries: Mapping[str, Collection[str]]) -> None:
    """Raise ConfigError unless every key of `registries` names one of what stands there."""
    for key, known in registries.items():
        section, _, field = key.partition(".")
        value = getattr(getattr(config, section), field)
        if value not in known:
            raise ConfigError(f"{key} = {value!r} is not known", where=key, fix=f"make it one of {', '.join(known)}")


def _check_length(config: Config) -> None:
    rounds, epochs = config.algorithm.rounds, config.algorithm.epochs
    if rounds is not None and epochs is not None:
        raise ConfigError(
            f"algorithm.rounds = {rounds} with algorithm.epochs = {epochs:g}",
            where="algorithm.rounds, algorithm.epochs",
            fix="say how long the run is in one of the two, and set the other to null",
        )


def _check_edges(config: Config) -> None:
    gossip = config.gossip
    if (gossip.graph == "edge_list") != (gossip.edges is not None):
        raise ConfigError(
            f"gossip.graph = {gossip.graph!r} with gossip.edges = {gossip.edges!r}",
            where="gossip",
            fix="set gossip.edges to the edge file together with gossip.graph=edge_list, or leave both out",
        )


def _check_failures(config: Config) -> None:
    """Raise ConfigError where what is set for clients that die contradicts cluster.on_failure or cluster.clients."""
    cluster = config.cluster
    if cluster.on_failure == "continue" and cluster.min_clients > cluster.clients > 1:
        raise ConfigError(
            f"cluster.min_clients = {cluster.min_clients}, but there are {cluster.clients} clients",
            where="cluster.min_clients",
            fix=f"set it to {cluster.clients} or less",
        )
    if cluster.return_s and cluster.on_failure == "stop":
        raise ConfigError(
            f"cluster.return_s = {cluster.return_s:g}, but with cluster.on_failure=stop no client continues",
            where="cluster.return_s",
            fix="set cluster.on_failure=continue, or leave cluster.return_s out",
        )


def _check_batch(config: Config) -> None:
    if config.data.batch_size % config.data.micro_batch_size:
        raise ConfigError(
            f"data.batch_size = {config.data.batch_size} is not a multiple of "
            f"data.micro_batch_size = {config.data.micro_batch_size}",
            where="data",
            fix="the client's batch is split into micro-batches over its ranks: choose a multiple",
        )


def _check_wait(config: Config) -> None:
    wait_s, timeout_s = config.gossip.wait_s, config.cluster.timeout_s
    if wait_s is not None and config.cluster.on_failure == "continue":
        raise ConfigError(
            f"gossip.wait_s = {wait_s:g} with cluster.on_failure=continue, where every averaging waits for all clients",
            where="gossip.wait_s",
            fix="set gossip.wait_s=null, or cluster.on_failure=stop",
        )
    if wait_s is not None and wait_s >= timeout_s:
        raise ConfigError(
            f"gossip.wait_s = {wait_s:g}, but a wait ends the job after cluster.timeout_s = {timeout_s:g}",
            where="gossip.wait_s",
            fix="make it less than cluster.timeout_s",
        )


def _check_best(config: Config) -> None:
    """Raise ConfigError for a key that compares evaluations, unless there are several, of a set that the configuration
    names, and all clients know one loss."""
    evaluation, data = config.evaluation, config.data
    scored = data.evaluation or data.per_client_evaluation or data.common_holdout > 0 or data.client_holdout > 0
    for key, value in (("evaluation.patience", evaluation.patience), ("checkpoint.best", config.checkpoint.best)):
        if value and not evaluation.every:
            raise ConfigError(
                f"{key} = {value}, but evaluation.every = 0",
                where=key,
                fix="set evaluation.every to the number of inner steps between evaluations",
            )
        if value and not evaluation.mean_model and config.cluster.clients > 1:
            raise ConfigError(
                f"{key} = {value}, but with evaluation.mean_model=false no client knows how well the others do",
                where=key,
                fix=f"set evaluation.mean_model=true, or leave {key} out",
            )
        if value and not scored:
            raise ConfigError(
                f"{key} = {value}, but there is no evaluation set to compare models on",
                where=key,
                fix="name one in data.evaluation, or hold one out with data.common_holdout or data.client_holdout",
            )


def check_world(config: Config, world_size: int) -> list[int]:
    """Return the number of ranks of each client, where `world_size` are launched.

    Raises ConfigError where they do not fit cluster.clients or cluster.ranks, or a client's batch not its ranks.
    """
    clients, ranks = config.cluster.clients, config.cluster.ranks
    if world_size == 1 < clients:
        raise ConfigError(
            f"one rank is launched for {clients} clients",
            where="the launcher, cluster.clients",
            fix=f"start a rank or more for each, as `deepspeed --num_accelerators {clients} launchers/train.py ...` or "
            f"`mpirun -n {clients} ...` does; one process trains all of them in `deca simulate`, or one alone with "
            "cluster.clients=1",
        )
    if ranks is None:
        if world_size % clients:
            raise ConfigError(
                f"{world_size} ranks cannot be divided among {clients} clients",
                where="cluster.clients",
                fix=f"launch a multiple of {clients} ranks, set cluster.clients to a divisor of {world_size}, or list "
                "each client's ranks in cluster.ranks",
            )
        ranks = [world_size // clients] * clients
    elif sum(ranks) != world_size:
        raise ConfigError(
            f"cluster.ranks = {list(ranks)} are {sum(ranks)} ranks, but {world_size} are launched",
            where="cluster.ranks",
            fix=f"launch {sum(ranks)} ranks, or change cluster.ranks",
        )
    for client, k in enumerate(ranks):
        per_forward = config.data.micro_batch_size * k
        if config.data.batch_size % per_forward:
            raise ConfigError(
                f"data.batch_size = {config.data.batch_size} cannot be split over the {k} ranks of client {client} "
                f"with data.micro_batch_size = {config.data.micro_batch_size}",
                where="data.batch_size",
                fix=f"choose a multiple of {per_forward}, or a smaller data.micro_batch_size",
            )
    return list(ranks)


def _check_ranks(config: Config) -> None:
    cluster, ranks = config.cluster, list(config.cluster.ranks or ())
    if len(ranks) != cluster.clients or min(ranks, default=0) < 1:
        raise ConfigError(
            f"cluster.ranks = {ranks} is not a number of ranks for each of cluster.clients = {cluster.clients}",
            where="cluster.ranks",
            fix=f"list {cluster.clients} numbers, each at least 1, or leave it out for clients of one size",
        )
    if config.gossip.wait_s is not None and len(set(ranks)) > 1:
        raise ConfigError(
            f"gossip.wait_s = {config.gossip.wait_s:g} is for clients of one size, and cluster.ranks = {ranks}",
            where="gossip.wait_s",
            fix="give all clients as many ranks, or set gossip.wait_s=null",
        )


def _check_absent(config: Config) -> None:
    cluster, absent = config.cluster, list(config.cluster.absent)
    if len(set(absent)) < len(absent) or not all(0 <= client < cluster.clients for client in absent):
        raise ConfigError(
            f"cluster.absent = {absent} does not name clients of 0 to {cluster.clients - 1}, each once",
            where="cluster.absent",
            fix="list the numbers of clients that are not started with the others",
        )
    if cluster.on_failure == "stop":
        raise ConfigError(
            f"cluster.absent = {absent}, but with cluster.on_failure=stop the job takes all clients",
            where="cluster.absent",
            fix="set cluster.on_failure=continue, or leave cluster.absent out",
        )
    if cluster.clients - len(absent) < max(1, cluster.min_clients):
        raise ConfigError(
            f"without those of cluster.absent = {absent} there are {cluster.clients - len(absent)} clients, fewer than "
            f"cluster.min_clients = {cluster.min_clients}",
            where="cluster.absent",
            fix="start with more clients, or lower cluster.min_clients",
        )


def _check_finite(section: Any, prefix: str) -> None:
    for field in fields(section):
        value = getattr(section, field.name)
        if is_dataclass(value):
            _check_finite(value, f"{prefix}{field.name}.")
        elif isinstance(value, float) and not abs(value) <= _LARGEST:
            fix = "give a finite number" + f" of at most {_LARGEST:g}" * math.isfinite(value)
            raise ConfigError(f"{prefix}{field.name} = {value}", where=prefix + field.name, fix=fix)

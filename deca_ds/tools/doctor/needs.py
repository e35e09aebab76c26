"""What a configuration wants of the hosts, as the plan knows it: from shapes, without weights or data."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

from deca_ds.config import Config
from deca_ds.config.checks import check_world
from deca_ds.config.hub import Kind
from deca_ds.config.paths import could_be_hub_name
from deca_ds.data.sources import LOOKS_LIKE_A_PATH
from deca_ds.engine.architecture import load_architecture
from deca_ds.errors import ModelError, UserError
from deca_ds.gossip import MixingSchedule, build_mixing
from deca_ds.launch import ClientLayout
from deca_ds.planning.estimate import Estimate
from deca_ds.tools.disk import Stored, disk_need
from deca_ds.tools.doctor.facts import Needs
from deca_ds.training.chosen_method import check_method
from deca_ds.training.resume import check_start


def files_needed(config: Config, slots: Mapping[str, int], file: Path | None) -> Needs:
    """Return what ranks read, and no sizes. slots: host -> ranks. file: of the configuration. Raises UserErrors where
    the clients cannot have so many ranks."""
    layout, host_of = _places(config, slots)
    return Needs(
        output=config.run.output,
        resume=config.run.resume,
        refused=None,
        transport=config.cluster.transport,
        device=config.run.device,
        mixed_versions=config.cluster.allow_mixed_versions,
        paths=paths_of(config, layout, host_of, file),
        names=names_of(config),
    )


def _places(config: Config, slots: Mapping[str, int]) -> tuple[ClientLayout, list[str]]:
    """Return the ranks of each client, and the host of each rank."""
    host_of = [host for host, count in slots.items() for _ in range(count)]
    return ClientLayout.of(check_world(config, len(host_of))), host_of


def needs_of(config: Config, slots: Mapping[str, int], file: Path | None = None) -> Needs:
    """slots: host -> ranks. file: of the configuration. Raises the UserErrors of a configuration that has no plan, or
    none for these hosts, except that of a model that is not here: the hosts may have it."""
    layout, host_of = _places(config, slots)
    check_method(config)
    mixing = build_mixing(config.gossip, config.cluster.clients, config.run.seed)
    unplanned = None
    try:
        disk, memory, gpu_memory, beside_gpus = _sizes(config, layout, mixing, host_of)
    except ModelError as error:
        unplanned, disk, memory, gpu_memory, beside_gpus = error, {}, {}, {}, {}
    return replace(
        files_needed(config, slots, file),
        refused=_refused(config),
        disk=disk,
        memory=memory,
        gpu_memory=gpu_memory,
        beside_gpus=beside_gpus,
        pairs=pairs_of(layout, mixing, host_of),
        unplanned=unplanned,
    )


def _sizes(
    config: Config, layout: ClientLayout, mixing: MixingSchedule, host_of: Sequence[str]
) -> tuple[dict[str, int], ...]:
    """Return disk, memory, gpu_memory and beside_gpus of `Needs`. host_of: of each rank."""
    architecture = load_architecture(config.model)
    ranks_of = [len(layout.ranks_of(layout.client_of(rank))) for rank in range(len(host_of))]
    on_gpus, on_cpus = (
        {k: Estimate(config, architecture, mixing, k, gpu) for k in set(ranks_of)} for gpu in (True, False)
    )
    of = on_cpus[ranks_of[0]]
    on_disk = disk_need(Stored.of(of.model, of.plan, config.model, of.rule), of.schedule, config.checkpoint).most
    disk, memory, gpu_memory, beside_gpus = (defaultdict[str, int](int) for _ in range(4))
    for k, host in zip(ranks_of, host_of, strict=True):
        disk[host] += on_disk // k
        memory[host] += on_cpus[k].at_rest("host")
        gpu_memory[host] += on_gpus[k].at_rest("gpu")
        beside_gpus[host] += on_gpus[k].at_rest("host")
    return dict(disk), dict(memory), dict(gpu_memory), dict(beside_gpus)


def _refused(config: Config) -> UserError | None:
    try:
        check_start(config)
    except UserError as error:
        return error
    return None


def names_of(config: Config) -> list[tuple[str, Kind, str]]:
    """Key, kind and name of what ranks have from the hub, on all hosts."""
    models = (("model.path", config.model.path), ("model.tokenizer", config.model.tokenizer))
    found: list[tuple[str, Kind, str]] = [
        (key, "model", name) for key, name in models if name is not None and not _is_model_path(name)
    ]
    for key, entries in (("data.train", config.data.train), ("data.evaluation", config.data.evaluation)):
        found += [(key, "dataset", entry.partition(":")[0]) for entry in entries if not _is_data_path(entry)]
    return found


def _is_model_path(path: str) -> bool:
    return os.path.exists(path) or not could_be_hub_name(path)


def _is_data_path(entry: str) -> bool:
    return os.path.exists(entry) or LOOKS_LIKE_A_PATH.search(entry) is not None


def paths_of(
    config: Config, layout: ClientLayout, host_of: Sequence[str], file: Path | None = None
) -> dict[str, list[tuple[str, str]]]:
    """Host -> (key, path) of what its ranks open. Names of the hub are no paths. file: of the configuration."""
    everywhere = [] if file is None else [("--config", str(file))]
    for key, path in (("model.path", config.model.path), ("model.tokenizer", config.model.tokenizer)):
        if path is not None and _is_model_path(path):
            everywhere.append((key, path))
    for key, path in (
        ("gossip.matrix", config.gossip.matrix),
        ("gossip.edges", config.gossip.edges),
        ("deepspeed", config.deepspeed),
    ):
        if path is not None:
            everywhere.append((key, path))
    for key, entries in (("data.train", config.data.train), ("data.evaluation", config.data.evaluation)):
        everywhere += [(key, path) for path in entries if _is_data_path(path)]
    found = {host: list(everywhere) for host in dict.fromkeys(host_of)}
    for key, paths in (
        ("data.per_client", config.data.per_client),
        ("data.per_client_evaluation", config.data.per_client_evaluation),
    ):
        for client, path in enumerate(paths[: layout.clients]):
            for host in dict.fromkeys(host_of[rank] for rank in layout.ranks_of(client)):
                found[host].append((key, path))
    return found


def pairs_of(layout: ClientLayout, mixing: MixingSchedule, host_of: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of hosts with an edge of the graph between them, with ranks of one client, or with the job's store."""
    order = {host: place for place, host in enumerate(dict.fromkeys(host_of))}
    joined = {(host_of[0], host) for host in order}
    for client in range(layout.clients):
        joined |= set(combinations(dict.fromkeys(host_of[rank] for rank in layout.ranks_of(client)), 2))
        for neighbour in mixing.neighbours(client):
            for rank in layout.ranks_of(client):
                joined |= {(host_of[rank], host_of[partner]) for partner in layout.partners(rank, neighbour)}
    ordered = {(one, other) if order[one] < order[other] else (other, one) for one, other in joined}
    return sorted((pair for pair in ordered if pair[0] != pair[1]), key=lambda pair: (order[pair[0]], order[pair[1]]))

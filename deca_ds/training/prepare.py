"""What one rank of a host does for the others there: it downloads from the hub, and tokenises its client's data."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from deca_ds.config import Config
from deca_ds.config.schema import ModelConfig
from deca_ds.data import ClientData, prepare_client_data, read_client_data
from deca_ds.data.cache import Cache
from deca_ds.data.rows import Work
from deca_ds.errors import DataError
from deca_ds.launch import Cluster, Launch
from deca_ds.launch.devices import machine
from deca_ds.launch.store import JobStore


@contextmanager
def first_of_host(model: ModelConfig, launch: Launch, store: JobStore, together: Sequence[int]) -> Iterator[None]:
    """The first rank on each machine runs the body before the others do, so that they find what it downloads.

    All ranks `together` call this. Where all have the model in a folder, nobody waits.
    """
    named = not all(os.path.isdir(path) for path in (model.path, model.tokenizer) if path is not None)
    seen = store.gather(launch, "downloads/hosts", [machine(launch.host), named], together)
    here = seen[launch.rank][0]
    waits = any(named for _, named in seen.values())
    is_first = launch.rank == min(rank for rank, (host, _) in seen.items() if host == here)
    if waits and not is_first:
        store.gather(launch, "downloads/done", None, together)
    yield
    if waits and is_first:
        store.gather(launch, "downloads/done", None, together)


def load_shared(config: Config, tokenizer: PreTrainedTokenizerBase, cluster: Cluster) -> ClientData:
    """This client's data, prepared by its first rank on each machine and memory-mapped by all of its ranks.

    Raises ConfigError and DataError, on the rank that prepares, and where hosts of the client have different data.
    """
    host, progress = cluster.launch.host, cluster.progress
    hosts = cluster.gather_in_client((machine(host), host))
    shards = [shard for shard, (other, _) in enumerate(hosts) if other == hosts[cluster.shard][0]]
    work = Work(torch.get_num_threads() * len(shards), progress.tick, shown=cluster.is_job_leader)
    with closing(Cache(config.data.cache, progress.tick)) as cache:

        def prepare() -> Path:
            return prepare_client_data(config, tokenizer, cluster.client, cache, work)

        found = cluster.gather_in_client(prepare() if cluster.shard == shards[0] else None)
        folder = found[shards[0]]
        if not folder.is_dir():  # a container of its own on the same machine
            folder = prepare()
        data = read_client_data(folder)
        contents = cluster.gather_in_client(data.content)  # all have mapped the files: they may go
    other = next((shard for shard, content in enumerate(contents) if content != contents[0]), None)
    if other is not None:
        raise DataError(
            f"client {cluster.client} has other data on {hosts[other][1]} than on {hosts[0][1]}",
            where="data.per_client" if config.data.per_client else "data.train, data.evaluation",
            fix="give all hosts of a client the same files",
        )
    return data

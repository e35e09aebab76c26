"""What a rank loads before it trains: the tokenizer, its client's data and the model. One rank of a host downloads from
the hub, and tokenises its client's data, for the others there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import torch
from datasets import disable_progress_bars
from rich.console import Console
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from deca_ds.algorithm import METHODS, fused_parameters
from deca_ds.checkpoint.adapters import save_adapters
from deca_ds.checkpoint.generation import save_generation_config
from deca_ds.config import Config
from deca_ds.config.schema import ModelConfig
from deca_ds.data import ClientData, prepare_client_data, read_client_data
from deca_ds.data.cache import Cache
from deca_ds.data.checks import tell_files
from deca_ds.data.rows import Work
from deca_ds.engine.adapters import find_adapters
from deca_ds.engine.architecture import load_architecture
from deca_ds.engine.check_model import check_model, check_token_ids
from deca_ds.engine.client import Client
from deca_ds.engine.load import load_model
from deca_ds.engine.tokenizer import load_tokenizer
from deca_ds.errors import DataError
from deca_ds.launch import Launch
from deca_ds.launch.devices import machine
from deca_ds.launch.progress import SHARED
from deca_ds.launch.store import JobStore
from deca_ds.launch.world import Cluster
from deca_ds.printing import print_wrapped
from deca_ds.run_folder import ADAPTERS, BASE
from deca_ds.training.config_warnings import config_warnings
from deca_ds.training.connect import Job
from deca_ds.training.notices import warn_of_blocks, warn_of_experts


def load_base(job: Job) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """Load the model's configuration and the tokenizer, and check them. All ranks that start together call this."""
    model, cluster = job.config.model, job.cluster
    disable_progress_bars()
    cluster.progress.enter("loading the tokenizer", works=True, awaits=SHARED)
    with first_of_host(model, cluster.launch, cluster.store, cluster.together):
        architecture, tokenizer = load_architecture(model), load_tokenizer(model)
        cluster.progress.enter("checking the model", works=True, awaits=SHARED)
        warnings = check_model(job.config, architecture, tokenizer)
    for warning in [*config_warnings(job.config), *warnings] if cluster.is_job_leader else ():
        print_wrapped(f"WARNING: {warning}")
    return architecture, tokenizer


def load_data(job: Job, architecture: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> ClientData:
    """Load this client's data, and check that the model knows all their tokens."""
    config, cluster = job.config, job.cluster
    cluster.progress.enter("reading the data", works=True, awaits=SHARED)
    for line in [
        *(tell_files(config.data) if cluster.is_job_leader else ()),
        *(tell_files(config.data, cluster.client) if cluster.is_leader else ()),  # on this client's own output
    ]:
        print_wrapped(line)
    data = load_shared(config, tokenizer, cluster)
    check_token_ids(architecture, data.train, data.own_evaluation, data.common_evaluation)
    return data


def load_client(job: Job, architecture: PretrainedConfig) -> Client:
    """Load the model onto this client's shards."""
    config, cluster = job.config, job.cluster
    cluster.progress.enter("loading the model", works=True, awaits=SHARED)
    model = load_model(config, architecture)
    torch.manual_seed(config.run.seed + cluster.launch.rank)  # dropout: the same in every run, different on every rank
    client = Client(config, model, cluster.device)
    if cluster.is_job_leader:
        console = Console(stderr=True)
        warn_of_blocks(console, client.plan)
        warn_of_experts(
            console, fused_parameters(client.model, client.plan.beside), config.model.gradient_checkpointing
        )
    return client


def save_base(job: Job, client: Client, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write what Hugging Face needs beside the weights, and of what kind the adapters are, into the run's folder."""
    model, folder = client.model, job.output / BASE
    if METHODS[job.config.algorithm.method].adapters:
        save_adapters(job.output, find_adapters(model))
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if model.can_generate() and (note := save_generation_config(model, tokenizer, folder)):
        print_wrapped(f"NOTE: {note}")


def forget_base(output: Path) -> None:
    """Remove what `save_base` has put into the run's folder. A start that failed may have had another model,
    tokenizer or method."""
    shutil.rmtree(output / BASE, ignore_errors=True)
    (output / ADAPTERS).unlink(missing_ok=True)


@contextmanager
def first_of_host(model: ModelConfig, launch: Launch, store: JobStore, together: Sequence[int]) -> Iterator[None]:
    """Have the first rank on each machine run the body before the others, so that they find what it downloads.

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
    """Load this client's data, prepared by its first rank on each machine and memory-mapped by all of its ranks.

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

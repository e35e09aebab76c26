"""What a configuration says that its writer hardly means: values that nothing reads under the others, backslashes that
YAML has left as they are, and graphs that do not bring clients together."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch

from deca_ds.algorithm import METHODS
from deca_ds.config import Config
from deca_ds.config.flat import flat
from deca_ds.config.schema import AlgorithmConfig, LoraConfig
from deca_ds.data.files import TABLES, kind_of
from deca_ds.data.formats import FORMATS
from deca_ds.data.sources import HubName, Source, find_sources
from deca_ds.errors import DataError
from deca_ds.gossip import MixingSchedule, slow_mixing
from deca_ds.training.chosen_method import rule_of

_ESCAPE = re.compile(r"\\[nrt]")


def _in_method(name: str, config: Config) -> bool:
    return name in METHODS[config.algorithm.method].coefficients


def _in_format(key: str, config: Config) -> bool:
    return key in FORMATS[config.data.format].keys


def _method(config: Config) -> str:
    return f"algorithm.method={config.algorithm.method} does not take it"


def _format(config: Config) -> str:
    return f"data.format={config.data.format} does not read it"


def _sources(config: Config) -> list[Source] | None:
    """Return the data sources that every machine may read: those of all clients together; None if some are missing,
    which is the run's to refuse."""
    data = config.data
    try:
        return find_sources(data.train, "data.train") + find_sources(data.evaluation, "data.evaluation")
    except DataError:
        return None


def _from_hub(config: Config) -> bool:
    sources = _sources(config)
    return sources is None or any(isinstance(source, HubName) for source in sources)


def _from_tables(config: Config) -> bool:
    sources = _sources(config)
    kinds = {kind_of(source) for source in sources or () if isinstance(source, Path)}
    return sources is None or bool(config.data.per_client) or not kinds.isdisjoint(TABLES)


Reading = tuple[Callable[[Config], bool], str | Callable[[Config], str]]
# key: whether anything reads its value, and why not
READ: dict[str, Reading] = {
    **{
        f"algorithm.{field.name}": (partial(_in_method, field.name), _method)
        for field in fields(AlgorithmConfig)
        if any(field.name in method.coefficients for method in METHODS.values())
    },
    **{
        f"lora.{field.name}": (lambda config: METHODS[config.algorithm.method].adapters, _method)
        for field in fields(LoraConfig)
    },
    **{f"data.{key}": (partial(_in_format, key), _format) for format in FORMATS.values() for key in format.keys},
    "blocks.order": (lambda config: config.blocks.layers_per_block is not None, "there is one block"),
    "cluster.min_clients": (lambda config: config.cluster.on_failure == "continue", "cluster.on_failure=stop"),
    "cluster.on_partition": (lambda config: config.cluster.on_failure == "continue", "cluster.on_failure=stop"),
    "data.alpha": (lambda config: config.data.partition == "dirichlet", "data.partition is not dirichlet"),
    "data.answers_only": (lambda config: not FORMATS[config.data.format].documents, _format),
    "data.client_holdout": (
        lambda config: not config.data.per_client_evaluation or config.data.client_holdout == 0,
        "data.per_client_evaluation takes its place",
    ),
    "data.column_names": (_from_tables, "there is no CSV or TSV file"),
    "data.split": (_from_hub, "there is no data set of the hub"),
    "data.subset": (_from_hub, "there is no data set of the hub"),
    "gossip.degree": (lambda config: config.gossip.graph == "base", "the graph is not base"),
    "gossip.edge_probability": (lambda config: config.gossip.graph == "erdos_renyi", "the graph is not erdos_renyi"),
    "gossip.graph": (lambda config: config.gossip.matrix is None, "gossip.matrix takes its place"),
    "gossip.weights": (
        lambda config: config.gossip.matrix is None and config.gossip.graph != "base",
        lambda config: "gossip.matrix takes its place" if config.gossip.matrix else "the graph base has its own",
    ),
    "logging.progress_s": (lambda config: config.logging.progress, "logging.progress=false"),
    "logging.project": (lambda config: config.logging.tracker != "none", "logging.tracker=none"),
    "model.masters": (lambda config: config.model.dtype == "bfloat16", "the model is not bfloat16"),
    "model.revision": (lambda config: not os.path.isdir(config.model.path), "model.path is a folder"),
    "optimizer.final_lr_ratio": (lambda config: config.optimizer.schedule != "constant", "the schedule is constant"),
}


def config_warnings(config: Config) -> list[str]:
    """Return warnings, a line each, of a configuration that has been checked. Looks for the files of data.train."""
    return [*_unread(config), *_backslashes(config)]


def gossip_warnings(config: Config, mixing: MixingSchedule, weight_scale: float) -> list[str]:
    """Return warnings, a line each, of a graph that is too slow or drives clients apart. weight_scale: see
    `slow_mixing`."""
    algorithm = config.algorithm
    found = slow_mixing(
        mixing,
        inner_steps=algorithm.inner_steps,
        gossip_every=config.gossip.every,
        lr=config.optimizer.lr,
        weight_scale=weight_scale,
    )
    return found + rule_of(config).warnings([torch.tensor(matrix) for matrix in mixing.matrices])


def length_warnings(config: Config, steps: int) -> list[str]:
    """Return warnings, a line each, of what a run of so many inner steps never comes to."""
    never = {
        "optimizer.warmup_steps": "the learning rate never comes to optimizer.lr",
        "logging.every": "the metrics have no step",
        "evaluation.every": "the models are scored before the first and after the last step only",
        "checkpoint.every": "no checkpoint is saved unless the job is told to stop",
    }
    given = flat(config)
    return [
        f"{key} = {given[key]}, but the run has {steps} inner steps: {what}"
        for key, what in never.items()
        if given[key] > steps
    ]


def _unread(config: Config) -> Iterator[str]:
    usual, given = flat(Config()), flat(config)
    for key, (is_read, reason) in READ.items():
        if given[key] != usual[key] and not is_read(config):
            yield f"{key} = {given[key]!r} has no effect: {reason if isinstance(reason, str) else reason(config)}"
    algorithm = config.algorithm
    if "signal" in METHODS[algorithm.method].coefficients and algorithm.signal == "none":
        for key in ("algorithm.b1", "algorithm.b2"):
            if given[key] != usual[key]:
                yield f"{key} = {given[key]!r} has no effect: algorithm.signal=none gives the moments nothing"


def _backslashes(config: Config) -> Iterator[str]:
    data = config.data
    if not FORMATS[data.format].has_labels:
        return
    words = ((f"data.label_names.{name}", word) for name, word in data.label_names.items())
    for key, text in (("data.prompt", data.prompt), *words):
        if found := _ESCAPE.search(text):
            yield (
                f"{key} = '{text}' has a backslash and the letter {found[0][1]} in it: if a line break or a tab is "
                'meant, put the text in double quotes, in which alone YAML knows "\\n" and "\\t"'
            )

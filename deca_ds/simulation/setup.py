"""Build a simulation from a run's configuration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from datasets import disable_progress_bars
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from deca_ds.config import Config
from deca_ds.config.paths import check_model_path
from deca_ds.data import ClientData, evaluation_batches, load_all, validate_data_config
from deca_ds.engine.adapters import add_adapters
from deca_ds.engine.architecture import DTYPES, find_blocks, load_architecture
from deca_ds.engine.causality import check_causal
from deca_ds.engine.check_model import check_model, check_token_ids
from deca_ds.engine.losses import check_own_loss
from deca_ds.engine.random_weights import draw_weights, nothing_drawn
from deca_ds.engine.tokenizer import load_tokenizer, padding_of
from deca_ds.engine.weight_files import given_weights
from deca_ds.errors import ConfigError
from deca_ds.gossip import MixingSchedule, build_mixing
from deca_ds.printing import print_wrapped
from deca_ds.simulation.simulate import Simulation
from deca_ds.simulation.stacked import StackedClients
from deca_ds.training.chosen_method import build_schedule, check_method, rule_of
from deca_ds.training.compare_clients import compare_data
from deca_ds.training.length import count_rounds
from deca_ds.training.template_date import today, with_date


def build(config: Config, data: Sequence[ClientData] | None = None) -> Simulation:
    """Build clients, data and method of `config`, all in this process; nothing is written.

    data: what `load_data` gave for the same data section, model and seed, where it is used again. Raises UserErrors.
    """
    mixing = check(config)
    config = with_date(config, today())
    architecture, tokenizer = load_architecture(config.model), load_tokenizer(config.model)
    for warning in check_model(config, architecture, tokenizer):
        print_wrapped(f"WARNING: {warning}")
    if data is None:
        data = load_data(config, tokenizer)
    for part in data:
        check_token_ids(architecture, part.train, part.own_evaluation, part.common_evaluation)
    model = _load_model(config, architecture)
    pad_id = padding_of(tokenizer)
    one_row = next(evaluation_batches(data[0].train.select(range(1)), batch_size=1, rank=0, ranks=1, pad_id=pad_id))
    model.eval()
    check_own_loss(model, one_row, model.device)
    check_causal(model, one_row["input_ids"][0])
    add_adapters(config, model)
    plan = find_blocks(config, model)
    rounds = count_rounds(config, len(plan.blocks), [len(part.train) for part in data])
    return Simulation(
        config=config,
        clients=StackedClients(model, plan, config.cluster.clients),
        rule=rule_of(config),
        schedule=build_schedule(config, len(plan.blocks), rounds),
        mixing=mixing,
        data=data,
        pad_id=pad_id,
    )


def check(config: Config) -> MixingSchedule:
    """Check what can be checked before anything is loaded, and return the mixing matrices. Raises UserErrors."""
    check_method(config)
    if config.cluster.absent:
        raise ConfigError(
            f"a simulation has all clients from the start, but cluster.absent = {list(config.cluster.absent)}",
            where="cluster.absent",
            fix="leave cluster.absent out",
        )
    mixing = build_mixing(config.gossip, config.cluster.clients, config.run.seed)
    check_model_path(config.model)
    for client in range(config.cluster.clients if config.data.per_client else 1):
        validate_data_config(config, client)
    return mixing


def load_data(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[ClientData]:
    """Load every client's data. In a simulation one process reads all of it, private files too."""
    disable_progress_bars()
    config = with_date(config, today())
    data = load_all(config, tokenizer)
    compare_data([part.summary for part in data], [part.label_names for part in data])
    return data


def _load_model(config: Config, architecture: PretrainedConfig) -> PreTrainedModel:
    given = given_weights(config.model, architecture) if config.model.init == "pretrained" else None
    options = {"trust_remote_code": config.model.trust_remote_code, "dtype": DTYPES[config.model.dtype]}
    if config.model.attention:
        options["attn_implementation"] = config.model.attention
    torch.manual_seed(config.run.seed)
    transformers_logging.disable_progress_bar()
    model: PreTrainedModel
    if given is None:
        with nothing_drawn():
            model = AutoModelForCausalLM.from_config(architecture, **options)
        draw_weights(model, config.run.seed)
        return model
    model = AutoModelForCausalLM.from_pretrained(
        config.model.path, config=architecture, revision=config.model.revision, **options
    )
    given.compare(model, lambda parameter: (0, parameter.numel(), parameter.data.view(-1)))
    return model

"""The keys of what the clients train on; see schema.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Optional

from deca_ds.config.key import DAY, at_least, inside, key, more_than, or_null

# OmegaConf reads the annotations at run time: Optional[...] and Literal[...] stay spelt out.
# ruff: noqa: RUF009, UP045


@dataclass
class DataConfig:
    """What the clients train on, and which client gets which examples. See [Data](data.md)."""

    train: list[str] = key(
        [],
        "Files, folders, globs, or hub data sets (`owner/name` or `owner/name:split`) that `data.partition` shares out "
        "among the clients.",
        "data.md#sources",
    )
    per_client: list[str] = key(
        [],
        "Instead of `data.train`: the file, folder or glob of client i at place i; only that client's ranks open it.",
        "data.md#who-gets-what",
    )
    evaluation: list[str] = key([], "Sources of the common evaluation set, which is the same for every client.")
    per_client_evaluation: list[str] = key(
        [],
        "With `data.per_client`: the evaluation file of client i at place i; without it, `data.client_holdout` of each "
        "client's examples is held out.",
    )
    common_holdout: float = key(
        0.0,
        "Share of `data.train` that becomes the common evaluation set before the partition.",
        allowed=inside("[0, 1)"),
    )
    client_holdout: float = key(
        0.1,
        "Share of each client's examples that is held out as the client's own evaluation set.",
        allowed=inside("[0, 1)"),
    )
    subset: Optional[str] = key(None, "Configuration name of a hub data set.")
    split: str = key("train", "Split of a hub data set.")
    format: str = key("text", "How a row becomes an example.", "formats.md")
    column_names: list[str] = key([], "Names for the columns of a CSV or TSV file that has no header.")
    incomplete: Literal["refuse", "leave_out"] = key(
        "refuse",
        "Rows without a value that the format needs, such as an empty answer: `refuse` the run at the first one, or "
        "`leave_out` these rows and say how many they are.",
        "formats.md#missing-values-and-labels",
    )
    text_columns: list[str] = key(["text"], "The columns that hold the text, joined by a space.")
    label_column: str = key("label", "The column that holds the label.")
    label_names: dict[str, str] = key(
        {},
        "The word that the model learns to answer for each label; an empty mapping takes the labels themselves.",
    )
    prompt: str = key(
        "{text}\nLabel:",
        "The prompt, in which the text replaces {text}; the answer follows after a space.",
    )
    partition: Literal["iid", "dirichlet", "key"] = key(
        "iid", "How `data.train` is shared out among the clients.", "data.md#who-gets-what"
    )
    alpha: float = key(
        0.25,
        "For the partition `dirichlet`: the concentration; a smaller value skews the clients' shares more.",
        allowed=more_than(0),
    )
    partition_column: Optional[str] = key(
        None,
        "For the partitions `dirichlet` and `key`: the column that decides who gets a row; `null` takes "
        "`data.label_column`.",
    )
    max_examples: Optional[int] = key(
        None,
        "Largest number of examples of `data.train` that is used, chosen with `run.seed`; `null` uses all.",
        allowed=or_null(at_least(1)),
    )
    date: Optional[str] = key(
        None,
        "For chat templates that write the date (`strftime_now`): the day as `YYYY-MM-DD`; `null` takes the day of the "
        "run's first start, on all ranks and after every resume.",
        allowed=or_null(DAY),
    )
    cache: Optional[str] = key(
        None,
        "Folder of tokenised data, which each host keeps for later starts; `null` takes `deca_ds` in the cache of the "
        "datasets library (`HF_DATASETS_CACHE`, `HF_HOME` or `~/.cache/huggingface`).",
        "data.md#preparation-and-cache",
    )
    max_length: int = key(512, "Largest number of tokens in a sequence; longer sequences are cut.", allowed=at_least(2))
    packing: bool = key(
        False,
        "Fill each sequence of `data.max_length` tokens with examples, each of which sees those before it.",
    )
    answers_only: bool = key(True, "Compute the loss on answers only, not on prompts (plain text has no prompts).")
    batch_size: int = key(16, "Sequences per client and inner step, over all ranks of the client.", allowed=at_least(1))
    micro_batch_size: int = key(
        4,
        "Sequences per rank and forward pass; gradient accumulation makes up the rest of the batch.",
        allowed=at_least(1),
    )

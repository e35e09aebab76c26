"""What the tests of the data part are made of: a tokenizer of bytes, short configurations, small files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from deca_ds.config.data import DataConfig
from deca_ds.config.schema import ClusterConfig, Config, EvaluationConfig, RunConfig
from deca_ds.data.formats import FORMATS, ExampleRules

PATHS = ("train", "per_client", "evaluation", "per_client_evaluation")
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_byte_tokenizer(**special: Any) -> PreTrainedTokenizerFast:
    """A token for each byte, so that lengths in tests can be counted by eye. A bos_token is put in front by default."""
    names = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if "bos_token" in special:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", **special)


def make_config(clients: int = 1, seed: int = 0, max_evaluation: int | None = 512, **data: Any) -> Config:
    data = {key: [str(path) for path in value] if key in PATHS else value for key, value in data.items()}
    return Config(
        run=RunConfig(seed=seed),
        cluster=ClusterConfig(clients=clients),
        data=DataConfig(**data),
        evaluation=EvaluationConfig(max_examples=max_evaluation),
    )


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def flat(lists: Iterable[list[Any]]) -> list[Any]:
    return list(chain.from_iterable(lists))


def chats(*conversations: list[dict[str, Any]], **row: Any) -> dict[str, list[str]]:
    """A batch for an Encoder, of rows of data.format=messages with the further fields `row`."""
    rules, format = ExampleRules("messages"), FORMATS["messages"]
    made = [format.example({"messages": turns, **row}, rules, "file, line 1", set()) for turns in conversations]
    return {"conversation": [one["conversation"] for one in made], "place": ["file, line 1"] * len(made)}


def targets_of(tokenizer: PreTrainedTokenizerFast, batch: dict[str, list[Any]]) -> list[list[str]]:
    """For each sequence the texts that carry the loss, one for each run of tokens without a gap."""
    runs = [groupby(zip(ids, labels, strict=True), lambda pair: pair[1] != -100) for ids, labels in columns_of(batch)]
    return [[tokenizer.decode([label for _, label in run]) for learned, run in of_row if learned] for of_row in runs]


def columns_of(batch: dict[str, list[Any]]) -> list[tuple[list[int], list[int]]]:
    return list(zip(batch["input_ids"], batch["labels"], strict=True))


def answer_of(tokenizer: PreTrainedTokenizerFast, row: dict[str, list[int]]) -> str:
    """The text that carries the loss in a row of input_ids and labels."""
    return tokenizer.decode([label for label in row["labels"] if label != -100])

"""The demo's files are what their scripts write, fit together, and leave every client without some of the labels."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from deca_ds.algorithm.blocks import split_into_blocks
from deca_ds.config.checks import check_world
from deca_ds.config.load import load_config
from deca_ds.data import load_client_data

REPOSITORY = Path(__file__).parents[2]
DEMO = REPOSITORY / "examples" / "demo"
LABELS = {"billing", "booking", "delivery", "hardware", "login", "network", "praise", "refund"}
HARDLY = 10  # fewer examples of a label than this count as not seen


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DEMO / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO / "model")


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(REPOSITORY)
    return load_config(DEMO / "demo.yaml")


@pytest.mark.parametrize(("script", "folder"), [("make_data.py", "data"), ("make_model.py", "model")])
def test_script_writes_the_committed_bytes(script: str, folder: str, tmp_path: Path) -> None:
    command = [sys.executable, str(DEMO / script), str(tmp_path / folder)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    committed = sorted(path.name for path in (DEMO / folder).iterdir())
    assert sorted(path.name for path in (tmp_path / folder).iterdir()) == committed
    for name in committed:
        written, kept = (tmp_path / folder / name).read_bytes(), (DEMO / folder / name).read_bytes()
        if name == "config.json":  # carries the version of transformers that wrote it
            written, kept = ({**json.loads(data), "transformers_version": None} for data in (written, kept))
        assert written == kept, name


def test_messages_are_distinct_balanced_and_do_not_name_a_desk() -> None:
    train, evaluation = rows("train"), rows("evaluation")
    texts = [row["text"] for row in train + evaluation]
    assert len(set(texts)) == len(texts)
    assert Counter(row["label"] for row in evaluation) == dict.fromkeys(LABELS, 50)
    assert {row["label"] for row in train} == LABELS
    assert not [text for text in texts if any(label in text.lower() for label in LABELS)]
    assert not [text for text in texts if "{" in text or "}" in text]
    assert sum((DEMO / "data" / f"{name}.jsonl").stat().st_size for name in ("train", "evaluation")) < 350_000


def test_every_label_is_one_token_of_its_own(tokenizer) -> None:
    tokens = [tokenizer(f" {label}", add_special_tokens=False).input_ids for label in sorted(LABELS)]
    assert all(len(ids) == 1 for ids in tokens)
    assert len({ids[0] for ids in tokens}) == len(LABELS)


def test_tokenizer_gives_texts_back_and_starts_them(tokenizer) -> None:
    text = "Grüße, the 99 euros are gone!\nLabel:"
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


def test_configuration_fits_the_model_and_six_ranks(config, tokenizer) -> None:
    assert check_world(config, 6) == [2, 2, 2]
    architecture = AutoConfig.from_pretrained(config.model.path)
    assert architecture.vocab_size == len(tokenizer)
    assert architecture.max_position_embeddings >= config.data.max_length
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture)
    plan = split_into_blocks(model, layers_per_block=config.blocks.layers_per_block, outside=config.blocks.outside)
    assert len(plan.blocks) == 3
    assert not plan.frozen
    assert sum(block.numel for block in plan.blocks) < 300_000


def test_every_client_lacks_labels_that_its_neighbours_hold(config, tokenizer) -> None:
    counts = []
    for client in range(config.cluster.clients):
        data = load_client_data(config, tokenizer, client)
        assert set(data.label_names) == LABELS
        assert data.summary["common_evaluation"] == 200
        counts.append(Counter(data.summary["labels"]))
    for count in counts:
        assert count.total() >= 400
        assert sum(count[label] < HARDLY for label in LABELS) == 3
    assert all(sum(count[label] for count in counts) == 300 for label in LABELS)

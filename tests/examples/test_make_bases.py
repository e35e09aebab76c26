"""The base models of the learnable studies: whole rows, labels of one token, a model that learns and loads."""

from __future__ import annotations

import pytest
import torch
from jobs import REPOSITORY
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = ["the match was lost in the last minute", "shares fell after the report", "a new star was seen"] * 20


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples" / "ablation"))


def test_a_row_that_is_cut_off_is_left_out(tmp_path):
    from make_bases import news_rows

    whole = '"1","a title","a ""quoted"" word, and a comma"\n"4","another","text"\n'
    (tmp_path / "news.csv").write_text(whole + '"2","cut off","in the mid')
    assert news_rows(tmp_path / "news.csv") == [
        ["1", "a title", 'a "quoted" word, and a comma'],
        ["4", "another", "text"],
    ]


def test_sentences_come_without_their_labels(tmp_path):
    from make_bases import sentences

    (tmp_path / "train.tsv").write_text("sentence\tlabel\na fine film \t1\n")
    assert sentences(tmp_path / "train.tsv") == ["a fine film "]


def test_a_base_model_learns_the_text_and_loads(tmp_path):
    from make_bases import LABELS, encode, make_model, make_tokenizer, train

    tokenizer = make_tokenizer(TEXTS)
    for label in LABELS:
        assert len(tokenizer(f" {label}").input_ids) == len(tokenizer(label).input_ids) == 1
    tokens = encode(TEXTS, tokenizer, seed=0)
    torch.manual_seed(0)
    model = make_model(tokenizer, hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    ids = tokens[:64].unsqueeze(0)

    def loss() -> float:
        with torch.no_grad():
            return float(model(input_ids=ids, labels=ids).loss)

    before = loss()
    train(model, tokens, steps=12, seed=0)
    after = loss()
    assert after < before - 0.1
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert float(loaded(input_ids=ids, labels=ids).loss.detach()) == pytest.approx(after, abs=1e-6)
    assert AutoTokenizer.from_pretrained(tmp_path)(TEXTS[0]).input_ids == tokenizer(TEXTS[0]).input_ids


def test_the_studies_on_them_are_understood():
    from ablation import load_studies, variants

    from deca_ds.config import load_config

    rows = list(variants(load_studies("learnable")))
    assert {row.name for row in rows} >= {"adamw, alone", "adamw, all data", "deca (descent)"}
    for row in rows:
        changes = {name: value for name, value in row.keys.items() if isinstance(value, str | int | float)}
        load_config(None, [f"{name}={value}" for name, value in changes.items()])

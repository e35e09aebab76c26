"""The readers on real files, where they are at hand: stories, plain text, tables, instructions, private tasks."""

import shutil

import pytest
from data_samples import answer_of, flat, make_config
from transformers import AutoTokenizer

from deca_ds.data import load_client_data, training_batches
from deca_ds.errors import DataError

AG_NEWS = {
    "format": "classification",
    "column_names": ["class", "title", "description"],
    "text_columns": ["title", "description"],
    "label_column": "class",
    "label_names": {1: "World", 2: "Sports", 3: "Business", 4: "Tech"},
    "max_length": 128,
}


@pytest.fixture(scope="module")
def stories_tokenizer(real_data):
    return AutoTokenizer.from_pretrained(real_data / "stories260k")


def test_stories_are_shared_out_and_make_batches(real_data, stories_tokenizer):
    config = make_config(clients=4, train=[real_data / "tinystories_1000"], max_length=128, max_examples=80)
    loaded = load_client_data(config, stories_tokenizer, 2)
    assert loaded.summary["train"] == 18 and loaded.summary["own_evaluation"] == 2
    assert loaded.train[0]["input_ids"][0] == stories_tokenizer.bos_token_id
    batches = training_batches(
        loaded.train, batch_size=4, micro_batch_size=2, rank=0, ranks=1, seed=0, client=2, pad_id=0
    )
    assert all(batch["input_ids"].shape[0] == 2 for batch in next(batches))


def test_plain_text_is_cut_into_full_sequences_that_give_it_back(real_data, stories_tokenizer, tmp_path):
    part = tmp_path / "part.txt"
    part.write_text((real_data / "tinyshakespeare" / "input.txt").read_text()[:20_000])
    loaded = load_client_data(make_config(train=[part], client_holdout=0.0, max_length=128), stories_tokenizer, 0)
    pieces = loaded.train["input_ids"][:]
    assert {len(piece) for piece in pieces[:-1]} == {128}
    assert stories_tokenizer.decode(flat(pieces), skip_special_tokens=True).strip() == part.read_text().strip()


def test_a_table_without_a_header_is_read_by_the_names_of_the_configuration(real_data, stories_tokenizer):
    config = make_config(
        clients=4, train=[real_data / "ag_news" / "test.csv"], partition="dirichlet", max_examples=200, **AG_NEWS
    )
    loaded = [load_client_data(config, stories_tokenizer, client) for client in range(4)]
    assert sum(one.summary["train"] + one.summary["own_evaluation"] for one in loaded) == 200
    skewed = [max(one.summary["labels"].values()) / one.summary["train"] for one in loaded]
    assert max(skewed) > 0.5
    learned = {answer_of(stories_tokenizer, row).removesuffix("</s>").strip() for one in loaded for row in one.train}
    assert learned == {"World", "Sports", "Business", "Tech"}


def test_a_table_that_breaks_off_is_refused_with_its_last_line(real_data, stories_tokenizer):
    config = make_config(train=[real_data / "ag_news" / "train_first_2560KiB.csv"], **AG_NEWS)
    with pytest.raises(DataError, match=r"(?s)unexpected end of data.*train_first_2560KiB\.csv, line 10430"):
        load_client_data(config, stories_tokenizer, 0)


def test_a_table_with_tabs_is_read_and_its_labels_named(real_data, stories_tokenizer):
    config = make_config(
        clients=2,
        max_evaluation=20,
        train=[real_data / "sst2" / "dev.tsv"],
        format="classification",
        text_columns=["sentence"],
        label_names={0: "bad", 1: "good"},
        common_holdout=0.1,
        max_examples=100,
    )
    loaded = load_client_data(config, stories_tokenizer, 0)
    assert loaded.summary["common_evaluation"] == 10 and len(loaded.common_evaluation) == 20
    assert set(loaded.summary["labels"]) == {"bad", "good"}


def test_instructions_are_packed_and_their_answers_alone_trained(real_data, stories_tokenizer):
    config = make_config(
        clients=2, train=[real_data / "alpaca" / "alpaca_en_demo.json"], format="alpaca", max_examples=40, packing=True
    )
    loaded = load_client_data(config, stories_tokenizer, 0)
    assert 0 < loaded.summary["target_tokens"] < loaded.summary["train_tokens"]
    assert loaded.summary["train"] <= loaded.summary["examples"] == 18


def test_a_client_reads_its_private_tasks_and_no_other_clients(real_data, stories_tokenizer, tmp_path):
    folder = real_data / "natural_instructions_64"
    training = sorted(folder.glob("local_training_*.json"))[:2]
    own = tmp_path / training[1].name
    shutil.copy(training[1], own)  # the other client's path does not exist here
    evaluation = folder / training[1].name.replace("training", "eval")
    config = make_config(
        clients=2,
        max_evaluation=10,
        per_client=["/another/host.json", own],
        per_client_evaluation=["/another/host.json", evaluation],
        format="alpaca",
        max_examples=50,
        max_length=256,
    )
    loaded = load_client_data(config, stories_tokenizer, 1)
    assert loaded.summary["examples"] == 50 and loaded.summary["own_evaluation"] == 10
    assert loaded.summary["labels"] == {}, "no column of a private file is counted for others to see"

"""What the data section refuses before anything is started: the message names the key or the path."""

import pytest
from data_samples import make_config, write_jsonl

from deca_ds.data import sources, validate_data_config
from deca_ds.errors import ConfigError, DataError

CLASSIFICATION = {"format": "classification", "label_names": {0: "bad", 1: "good"}}


@pytest.fixture
def file(tmp_path):
    return write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "label": 0}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, r"data\.alpha"),
        ({"common_holdout": 1.0}, r"data\.common_holdout"),
        ({"client_holdout": -0.1}, r"data\.client_holdout"),
        ({"max_examples": 0}, r"data\.max_examples"),
        ({"date": "3 March"}, r"data\.date"),
        ({"max_length": 1}, r"data\.max_length"),
        ({"batch_size": 0}, r"data\.batch_size"),
        ({"micro_batch_size": 0}, r"data\.micro_batch_size"),
        ({"text_columns": []}, r"data\.text_columns"),
        ({**CLASSIFICATION, "prompt": "Label:"}, r"data\.prompt"),
        ({**CLASSIFICATION, "label_column": ""}, r"data\.label_column"),
        ({**CLASSIFICATION, "label_names": {0: "bad", 1: "bad"}}, r"data\.label_names"),
        ({**CLASSIFICATION, "label_names": {0: "bad", 1: " "}}, r"data\.label_names"),
        ({"partition": "key"}, r"data\.partition_column"),
        ({"partition": "dirichlet", "format": "alpaca"}, r"data\.partition_column"),
        ({"per_client": ["a"]}, r"data\.train and data\.per_client"),
        ({"per_client_evaluation": ["a"]}, r"data\.per_client_evaluation"),
        ({"column_names": ["text", "text"]}, r"data\.column_names"),
    ],
)
def test_a_value_or_a_combination_that_cannot_work_is_refused_by_its_key(file, options, message):
    with pytest.raises(ConfigError, match=message):
        validate_data_config(make_config(train=[file], **options))


def test_an_evaluation_of_no_examples_is_refused(file):
    with pytest.raises(ConfigError, match=r"evaluation\.max_examples"):
        validate_data_config(make_config(train=[file], max_evaluation=0))


def test_a_correct_section_passes(file, monkeypatch):
    monkeypatch.setattr(sources, "why_not_on_hub", lambda *_: None)
    validate_data_config(make_config(train=[file], evaluation=[file]))
    validate_data_config(make_config(train=["owner/name"], subset="small"))
    validate_data_config(make_config(train=[file], packing=True, partition="dirichlet", **CLASSIFICATION))


def test_data_must_come_from_somewhere():
    with pytest.raises(ConfigError, match=r"(?s)no training data.*data\.train"):
        validate_data_config(make_config())


def test_missing_files_are_named(file):
    with pytest.raises(DataError, match=r"(?s)nothing\.jsonl.*data\.train"):
        validate_data_config(make_config(train=["nothing.jsonl"]))
    with pytest.raises(DataError, match=r"(?s)nothing\.jsonl.*data\.evaluation"):
        validate_data_config(make_config(train=[file], evaluation=["nothing.jsonl"]))


def test_only_the_own_private_path_must_exist(file):
    config = make_config(clients=2, per_client=[file, "/other/host.jsonl"])
    validate_data_config(config)
    validate_data_config(config, client=0)
    with pytest.raises(DataError, match=r"(?s)/other/host\.jsonl.*data\.per_client\[1\].*client 1"):
        validate_data_config(config, client=1)
    config.data.per_client_evaluation = ["/other/host.jsonl", str(file)]
    with pytest.raises(DataError, match=r"data\.per_client_evaluation\[0\]"):
        validate_data_config(config, client=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clients": 3}, r"(?s)2 entries for 3 clients.*data\.per_client"),
        ({"per_client_evaluation": ["a"]}, r"data\.per_client_evaluation has 1 entries"),
        ({"common_holdout": 0.1}, r"data\.common_holdout"),
        ({"partition": "key", "partition_column": "x"}, r"data\.partition"),
        ({"format": "classification"}, r"(?s)without exchanging data.*data\.label_names"),
    ],
)
def test_keys_that_do_not_go_with_private_files_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        validate_data_config(make_config(**{"clients": 2, "per_client": ["a", "b"], **options}))


def test_two_common_evaluation_sets_are_refused(file):
    with pytest.raises(ConfigError, match=r"data\.common_holdout"):
        validate_data_config(make_config(train=[file], evaluation=[file], common_holdout=0.1))


def test_a_file_that_does_not_fit_the_format_is_refused(tmp_path):
    for name in ("a.txt", "a.csv"):
        (tmp_path / name).write_text("text\nx\n")
    with pytest.raises(ConfigError, match=r"(?s)\.txt.*data\.format"):
        validate_data_config(make_config(train=[tmp_path / "a.txt"], format="alpaca"))
    with pytest.raises(ConfigError, match=r"(?s)a table has no lists or objects.*data\.format"):
        validate_data_config(make_config(train=[tmp_path / "a.csv"], format="sharegpt"))
    with pytest.raises(ConfigError, match=r"(?s)lacks text, label.*data\.column_names"):
        validate_data_config(make_config(train=[tmp_path / "a.csv"], column_names=["x", "y"], **CLASSIFICATION))
    with pytest.raises(ConfigError, match=r"lacks topic"):
        validate_data_config(make_config(train=[tmp_path / "a.csv"], column_names=["text"], partition_column="topic"))

"""Whatever a configuration file holds, it gives a configuration or one ConfigError that names the file."""

from __future__ import annotations

import json

import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deca_ds.config import load_config
from deca_ds.config.deepspeed import read_deepspeed_json
from deca_ds.config.load import save_config
from deca_ds.errors import ConfigError

LIGHT = settings(max_examples=100)
BASE = {"model": {"path": "model"}, "data": {"train": ["rows.jsonl"]}}
VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.lists(st.integers(), max_size=2)
)
SECTIONS = st.dictionaries(
    st.sampled_from(["run", "cluster", "model", "blocks", "algorithm", "optimizer", "gossip", "data", "lora", "other"]),
    VALUES
    | st.dictionaries(
        st.sampled_from(
            ["seed", "clients", "lr", "layers_per_block", "order", "graph", "alpha", "rounds", "train", "x"]
        ),
        VALUES,
        max_size=3,
    ),
    max_size=3,
)


@LIGHT
@given(content=st.binary(max_size=80) | SECTIONS.map(lambda tree: yaml.safe_dump(BASE | tree).encode()))
@example(content=b"run: ${x}\n")
@example(content=b"run: {seed: ${run.seed}}\n")
@example(content=b"run: &a {output: *a}\n")
@example(content=b"a: 1\na: 2\n")
@example(content=b"[" * 5000)
@example(content=b"run: {seed: " + b"9" * 5000 + b"}\n")
def test_any_yaml_file_is_a_configuration_or_one_error(tmp_path, content):
    path = tmp_path / "any.yaml"
    path.write_bytes(content)
    try:
        config = load_config(path)
    except ConfigError as error:
        assert str(error)
        return
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


@LIGHT
@given(
    content=st.binary(max_size=60)
    | st.dictionaries(
        st.sampled_from(["zero_optimization", "optimizer", "fp16", "train_batch_size", "other"]),
        VALUES | st.dictionaries(st.sampled_from(["stage", "enabled", "offload_param", "x"]), VALUES, max_size=2),
    ).map(lambda tree: json.dumps(tree).encode())
)
@example(content=b"[" * 100_000)
@example(content=b'{"zero_optimization": {"stage": ' + b"9" * 5000 + b"}}")
def test_any_deepspeed_json_is_read_or_refused_with_its_name(tmp_path, content):
    path = tmp_path / "any.json"
    path.write_bytes(content)
    try:
        read = read_deepspeed_json(path)
    except ConfigError as error:
        assert str(path) in str(error) or "deepspeed" in str(error)
    else:
        assert isinstance(read, dict)

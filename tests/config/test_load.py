"""Loading: defaults, YAML, dotlist; every mistake names key, value and remedy."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deca_ds.config import Config, load_config, save_config
from deca_ds.config.checks import check_world
from deca_ds.config.deepspeed import read_deepspeed_json
from deca_ds.config.resume import check_output
from deca_ds.errors import ConfigError

BASE = ["model.path=somewhere"]


def refused(match, *overrides):
    with pytest.raises(ConfigError, match=match) as caught:
        load_config(None, [*BASE, *overrides])
    return str(caught.value)


def test_file_then_dotlist_then_saved_and_read_back(tmp_path):
    file = tmp_path / "run.yaml"
    names = "{1: World, 2: Sports}"
    file.write_text(f"model: {{path: here}}\noptimizer: {{lr: 1e-3, clip_norm: 0.5}}\ndata: {{label_names: {names}}}\n")
    config = load_config(file, ["optimizer.lr=2e-3", "data.train=[a.json,b.json]"])
    assert (config.optimizer.lr, config.optimizer.clip_norm, config.model.path) == (2e-3, 0.5, "here")
    assert config.data.train == ["a.json", "b.json"]
    assert config.data.label_names == {"1": "World", "2": "Sports"}
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_a_file_that_is_no_yaml_is_named_with_its_line_and_a_remedy(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model:\n  path: here\n cluster:\n  clients: 4\n")
    with pytest.raises(ConfigError, match=r"not valid YAML[\s\S]*run\.yaml, line 3\n  fix: .*indent with blanks"):
        load_config(file, [])


def test_how_long_a_run_is_is_said_once(tmp_path):
    def length(*overrides):
        config = load_config(file, [*BASE, *overrides])
        save_config(config, tmp_path / "saved.yaml")
        assert load_config(tmp_path / "saved.yaml") == config
        return config.algorithm.rounds, config.algorithm.epochs

    file = None
    assert length() == (4, None) and length("algorithm.epochs=0.5") == (None, 0.5)
    file = tmp_path / "run.yaml"
    file.write_text("algorithm: {rounds: 7}\n")
    assert length() == (7, None) and length("algorithm.rounds=null", "algorithm.epochs=2") == (None, 2.0)


def test_unknown_keys_suggest_the_right_one():
    assert "did you mean optimizer.lr?" in refused(r"optimizer\.lrr = 1", "optimizer.lrr=1")
    assert "did you mean optimizer?" in refused("optimzer", "optimzer.lr=1")
    assert "known here: run, cluster" in refused("unknown key", "xyz=1")


def test_wrong_types_and_choices_name_the_value():
    assert "fix:   change the value; optimizer.lr: Peak" in refused("optimizer.lr = 'fast'.*Float", "optimizer.lr=fast")
    assert "Number of ranks of each client" in refused(r"cluster.ranks\[0\] = 'a'", "cluster.ranks=[a]")
    refused("gossip.graph = 'rnig'.*ring", "gossip.graph=rnig")
    refused("data.train", "data.train={a: x}")
    refused("optimizer.lr.*nan|nan.*optimizer.lr", "optimizer.lr=.nan")
    refused("optimizer.lr = 1e\\+38[\\s\\S]*at most 1e\\+30", "optimizer.lr=1e38")
    refused(r"optimizer.lr: Interpolation key 'x.y' not found", "optimizer.lr=${x.y}")
    refused("cannot read the argument", "optimizer.lr")
    refused("cannot read the argument '--verbose'", "--verbose")
    refused(r"(?s)cannot read the argument '=3'.*key=value", "=3")
    refused("optimizer: there is a single value where a mapping", "optimizer=3")


@pytest.mark.parametrize(
    "override",
    [
        "cluster.clients=0",
        "algorithm.b2=1",
        "algorithm.a1=1",
        "algorithm.inner_steps=0",
        "optimizer.lr=-1",
        "gossip.every=0",
        "gossip.wait_s=0",
        "gossip.chunk_mib=0",
        "data.max_length=1",
        "run.threads=0",
        "algorithm.rounds=0",
        "algorithm.epochs=0",
        "run.seed=-1",
        "logging.every=0",
        "blocks.layers_per_block=0",
    ],
)
def test_a_value_out_of_range_is_refused_by_its_key(override):
    refused(re.escape(override.split("=")[0]) + ".*out of range", override)


def test_keys_that_contradict_each_other_are_refused_together():
    refused("gossip.graph = 'edge_list' with gossip.edges = None", "gossip.graph=edge_list")
    refused("gossip.graph = 'base' with gossip.edges = 'e.txt'", "gossip.edges=e.txt")
    refused("gossip.wait_s = 2 with cluster.on_failure=continue", "gossip.wait_s=2", "cluster.on_failure=continue")
    refused("gossip.wait_s = 60, .* cluster.timeout_s = 60", "gossip.wait_s=60", "cluster.timeout_s=60")
    refused("algorithm.rounds = 2 with algorithm.epochs = 3", "algorithm.rounds=2", "algorithm.epochs=3")
    alone = "evaluation.mean_model=false"
    refused("evaluation.patience = 2, but evaluation.every = 0", "evaluation.patience=2")
    refused("checkpoint.best = True, but evaluation.every = 0", "checkpoint.best=true")
    refused("no client knows", "checkpoint.best=true", "evaluation.every=5", alone, "cluster.clients=2")
    held = "data.client_holdout=0.1"
    load_config(None, [*BASE, "checkpoint.best=true", "evaluation.every=5", alone, held])
    refused("data.batch_size = 6 is not a multiple", "data.batch_size=6", "data.micro_batch_size=4")


@pytest.mark.parametrize("key", ["checkpoint.best=true", "evaluation.patience=2"])
def test_models_are_not_compared_without_an_evaluation_set(key):
    refused("there is no evaluation set to compare models on", key, "evaluation.every=5", "data.client_holdout=0")
    sets = ("client_holdout=0.1", "common_holdout=0.1", "evaluation=[e]", "per_client_evaluation=[e]")
    for held in sets:
        load_config(None, [*BASE, key, "evaluation.every=5", "data.client_holdout=0", f"data.{held}"])


def test_a_missing_value_and_an_unreadable_file_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no value for model\.path"):
        load_config(None)
    with pytest.raises(ConfigError, match=r"no configuration file.*absent\.yaml"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "bad.yaml").write_text("model:\n  path: {x\n")
    with pytest.raises(ConfigError, match=r"bad\.yaml, line"):
        load_config(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    with pytest.raises(ConfigError, match="keys and values"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match=r"binary\.yaml"):
        load_config(tmp_path / "binary.yaml")


@settings(max_examples=150)
@given(st.text(max_size=40))
def test_no_argument_makes_a_traceback(text):
    try:
        load_config(None, [*BASE, text])
    except ConfigError as error:
        assert str(error)


def test_a_number_of_ranks_that_clients_or_batch_cannot_share_is_refused():
    config = load_config(None, [*BASE, "cluster.clients=3", "data.batch_size=8", "data.micro_batch_size=2"])
    assert check_world(config, 6) == [2, 2, 2]
    with pytest.raises(ConfigError, match=r"one rank is launched for 3 clients[\s\S]*deepspeed --num_accelerators 3 "):
        check_world(config, 1)
    with pytest.raises(ConfigError, match="7 ranks cannot be divided among 3 clients"):
        check_world(config, 7)
    with pytest.raises(ConfigError, match=r"data\.batch_size = 8 cannot be split over the 3 ranks of client 0"):
        check_world(config, 9)


def test_cluster_ranks_gives_each_client_its_ranks_and_must_fit_the_other_keys():
    keys = [*BASE, "cluster.clients=3", "data.batch_size=8", "data.micro_batch_size=2"]
    config = load_config(None, [*keys, "cluster.ranks=[2,1,1]"])
    assert check_world(config, 4) == [2, 1, 1]
    with pytest.raises(ConfigError, match=r"cluster\.ranks = \[2, 1, 1\] are 4 ranks, but 6 are launched"):
        check_world(config, 6)
    with pytest.raises(ConfigError, match=r"cannot be split over the 3 ranks of client 2"):
        check_world(load_config(None, [*keys, "cluster.ranks=[2,1,3]"]), 6)
    for ranks in ("[2,2,2]", "[2,1,1]"):
        load_config(None, [*keys, f"cluster.ranks={ranks}", "cluster.on_failure=continue"])
    with pytest.raises(ConfigError, match=r"gossip\.wait_s = 2 is for clients of one size"):
        load_config(None, [*keys, "cluster.ranks=[2,1,1]", "gossip.wait_s=2"])
    with pytest.raises(ConfigError, match=r"cluster\.min_clients = 4, but there are 3 clients"):
        load_config(None, [*keys, "cluster.min_clients=4", "cluster.on_failure=continue"])
    with pytest.raises(ConfigError, match=r"cluster\.return_s = 60, but with cluster\.on_failure=stop no client"):
        load_config(None, [*keys, "cluster.return_s=60"])
    load_config(None, [*keys, "cluster.return_s=60", "cluster.on_failure=continue"])
    load_config(None, [*keys, "cluster.absent=[2]", "cluster.on_failure=continue"])


@pytest.mark.parametrize(
    ("absent", "more", "message"),
    [
        ("[3]", [], "does not name clients of 0 to 2, each once"),
        ("[1,1]", [], "does not name clients of 0 to 2, each once"),
        ("[1]", ["cluster.on_failure=stop"], "with cluster.on_failure=stop the job takes all clients"),
        ("[0,1]", [], "there are 1 clients, fewer than cluster.min_clients = 2"),
        ("[0,1,2]", ["cluster.min_clients=1"], "there are 0 clients, fewer than"),
    ],
)
def test_clients_that_cannot_be_absent_are_refused(absent, more, message):
    keys = [*BASE, "cluster.clients=3", "cluster.on_failure=continue", f"cluster.absent={absent}", *more]
    with pytest.raises(ConfigError, match=rf"cluster\.absent = .*{message}"):
        load_config(None, keys)


@pytest.mark.parametrize("ranks", ["[2,1]", "[2,1,1,1]", "[]", "[2,0,1]", "[2,1,-1]", "[2,1,null]", "[2,1,x]", "4"])
def test_numbers_of_ranks_that_fit_no_clients_are_refused(ranks):
    with pytest.raises(ConfigError, match=r"cluster\.ranks"):
        load_config(None, [*BASE, "cluster.clients=3", f"cluster.ranks={ranks}"])


def test_output_folder_is_never_used_twice(tmp_path):
    config = load_config(None, [*BASE, f"run.output={tmp_path / 'new'}"])
    assert check_output(config) == tmp_path / "new"
    (tmp_path / "new").mkdir()
    check_output(config)
    (tmp_path / "new" / "DONE").touch()
    with pytest.raises(ConfigError, match="already used"):
        check_output(config)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"zero_optimization": {"stage": 2}}', "stage = 2"),
        ('{"fp16": {"enabled": true}}', "fp16 cannot be set here"),
        ('{"optimizer": {"type": "Adam"}}', "optimizer cannot be set here"),
        ('{"zero_optimization": {"zero_hpz_partition_size": 2}}', "zero_hpz_partition_size cannot be set"),
        ('{"zero_optimization": {"stage3_allgather_sequential": true}}', "stage3_allgather_sequential cannot be set"),
        ('{"zero_optimization": {"zero_quantized_weights": true}}', "zero_quantized_weights cannot be set"),
        ('{"zero_optimization": {"offload_param": {"device": "nvme"}}}', "'nvme'"),
        ('{"zero_optimization": 3}', "is a JSON object"),
        ("[1]", "is a JSON object"),
        ('{"a": 1\n"b"}', "line 2"),
    ],
)
def test_deepspeed_json_is_checked_before_anything_starts(tmp_path, content, message):
    file = tmp_path / "ds.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_config(None, [*BASE, f"deepspeed={file}"])


def test_a_deepspeed_json_that_fits_is_read_and_a_missing_one_refused(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}')
    assert read_deepspeed_json(file)["zero_optimization"]["offload_param"] == {"device": "cpu"}
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(None, [*BASE, f"deepspeed={tmp_path / 'none.json'}"])


SECTIONS = {"model": {"path": "tiny"}, "data": {"train": ["a.jsonl"]}}
SCRIPT = "where: the configuration that the script gives"


def test_what_a_script_gives_is_read_as_the_file_would_be(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: {path: '1e3'}\ndata: {train: a.jsonl, format: classification, label_names: {0: 'no', 1: 'yes'}}\n"
        "optimizer: {lr: 0.25}\nalgorithm: {rounds: 3}\nevaluation: {mean_model: false}\ngossip: {wait_s: null}\n"
    )
    mapping = {
        "model": {"path": Path("1e3")},
        "data": {"train": Path("a.jsonl"), "format": "classification", "label_names": {0: "no", 1: "yes"}},
        "optimizer": {"lr": np.float32(0.25)},
        "algorithm": {"rounds": np.int64(3)},
        "evaluation": {"mean_model": False},
        "gossip": {"wait_s": None},
    }
    config = load_config(file)
    assert load_config(str(file)) == load_config(mapping) == load_config(config) == config
    changed = load_config(config, ["optimizer.lr=1", "data.train=[b,c]"])
    assert (changed.optimizer.lr, changed.data.train, changed.model.path) == (1.0, ["b", "c"], "1e3")
    assert config.optimizer.lr == 0.25, "the given one stays as it is"
    tuples = load_config({**SECTIONS, "data": {"train": ("a: b\nc", "d")}})
    assert tuples.data.train == ["a: b\nc", "d"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({**SECTIONS, "optimizer.lr": 1.0}, "optimizer.lr: in a file a dot does not part names"),
        ({**SECTIONS, "optimzer": {"lr": 1.0}}, "did you mean optimizer"),
        ({**SECTIONS, "optimizer": {"lr": True}}, "a number belongs here"),
        ({**SECTIONS, "model": {"path": False}}, "model.path: YAML reads"),
        ({**SECTIONS, "optimizer": {"lr": object()}}, "cannot represent an object"),
        ({**SECTIONS, "optimizer": {"lr": "large"}}, "could not be converted to Float"),
        ({"data": {"train": ["a.jsonl"]}}, "no value for model.path"),
    ],
)
def test_a_mistake_in_what_a_script_gives_names_the_script_and_no_line(source, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(source)
    assert SCRIPT in str(caught.value) and "line" not in str(caught.value)


def test_a_mistake_in_an_object_is_told_without_a_value_that_is_not_its_own():
    config = Config()
    config.model.path, config.optimizer.lr = "tiny", "large"
    with pytest.raises(ConfigError, match=r"^optimizer\.lr: Value 'large'"):
        load_config(config)

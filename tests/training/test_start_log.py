"""starts.json: an entry a start, and no more than that depends on it."""

import json

import pytest

from deca_ds.algorithm.blocks import Block, BlockPlan
from deca_ds.config.schema import Config, GossipConfig
from deca_ds.gossip.schedule import build_mixing
from deca_ds.run_folder import STARTS
from deca_ds.training.chosen_method import in_words
from deca_ds.training.start_log import record_start


def test_every_start_has_its_entry(tmp_path):
    plan = BlockPlan((Block("embeddings", ("e",), 6), Block("layers 0-1", ("w",), 4)), frozen=("f",))
    config = Config()
    config.run.output = str(tmp_path)
    (tmp_path / STARTS).write_text("[{torn")
    for done in (0, 12):
        record_start(
            config, build_mixing(GossipConfig(), 2, 0), done=done, rounds=3, architecture="Linear", parameters=15,
            plan=plan, ranks=[2, 1], transport="torch",
        )  # fmt: skip
    first, second = json.loads((tmp_path / STARTS).read_text())
    assert (first["step"], second["step"]) == (0, 12) and first["time"] <= second["time"]
    assert first["method"] == "DECA (signal: descent)" and first["papers"] == ["2606.03209"]
    assert first["rounds"] == 3 and first["epochs"] is None
    assert first["ranks"] == [2, 1] and first["device"] == "CPU" and first["transport"] == "torch"
    assert {"deca_ds", "Python", "torch", "deepspeed", "transformers"} <= first["software"].keys()
    model = {"architecture": "Linear", "parameters": 15, "blocks": [["embeddings", 6], ["layers 0-1", 4]]}
    assert first["model"] == model
    assert [path.name for path in tmp_path.iterdir()] == [STARTS], "nothing in part is left"


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("deca", "DECA (signal: none)"),
        ("deca-ed", "DECA with exact diffusion (signal: none)"),
        ("gossip-adam", "gossip-adam"),  # which takes no signal
    ],
)
def test_a_method_is_named_with_its_signal(method, said):
    config = Config()
    config.algorithm.method, config.algorithm.signal = method, "none"
    assert in_words(config) == said

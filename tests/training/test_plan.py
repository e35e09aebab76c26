"""What a dry run refuses before it loads anything."""

import pytest

from deca_ds.config import load_config
from deca_ds.errors import ConfigError
from deca_ds.training.plan import print_plan


def test_late_neighbours_need_a_symmetric_matrix(word_files, tmp_path):
    keys = [f"run.output={tmp_path / 'run'}", "model.path=/nowhere", "cluster.clients=3", "gossip.wait_s=2"]
    keys.append(f"data.train=[{word_files[0]}]")
    with pytest.raises(ConfigError, match=r"the mixing matrix is not symmetric .one_peer_exponential") as caught:
        print_plan(load_config(None, [*keys, "gossip.graph=one_peer_exponential"]))
    assert caught.value.where == "gossip.wait_s"
    directed = tmp_path / "w.txt"
    directed.write_text("1/2 1/2 0\n0 1/2 1/2\n1/2 0 1/2\n")
    with pytest.raises(ConfigError, match=rf"the mixing matrix is not symmetric .matrix {directed}"):
        print_plan(load_config(None, [*keys, f"gossip.matrix={directed}"]))

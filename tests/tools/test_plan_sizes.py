"""The dry run of clients of different sizes."""

from __future__ import annotations

import pytest

from deca_ds.config import load_config
from deca_ds.errors import ConfigError
from deca_ds.tools.plan import print_plan


def config(tiny_model, word_files, tmp_path, ranks: str):
    keys = [f"model.path={tiny_model}", "cluster.clients=3", f"cluster.ranks={ranks}", "data.batch_size=8"]
    files = f"data.per_client=[{','.join(map(str, word_files))}]"
    return load_config(None, [*keys, files, "data.micro_batch_size=2", f"run.output={tmp_path / 'run'}"])


def test_the_plan_names_the_ranks_of_each_client(tiny_model, word_files, tmp_path, capsys):
    print_plan(config(tiny_model, word_files, tmp_path, "[2,1,1]"))
    told = " ".join(capsys.readouterr().out.split())
    assert "launch: 4 ranks of clients of different sizes (client 0: 2, client 1: 1, client 2: 1)" in told
    print_plan(config(tiny_model, word_files, tmp_path, "[2,2,2]"), world_size=6)
    assert "launch: 6 ranks = 3 clients x 2 ranks" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("ranks", "message"), [("[2,1,1]", "are 4 ranks, but 3 are launched"), ("[3,1,1]", "3 ranks")])
def test_the_plan_refuses_what_the_run_would_refuse(tiny_model, word_files, tmp_path, ranks, message):
    with pytest.raises(ConfigError, match=message):
        print_plan(config(tiny_model, word_files, tmp_path, ranks), 3 if ranks == "[2,1,1]" else None)

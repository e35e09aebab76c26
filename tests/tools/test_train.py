import pytest

from deca_ds.errors import LaunchError
from deca_ds.tools import train


@pytest.mark.parametrize(("key", "seconds"), [("timeout_s=90", 90), ("timeout_s=5", 60), ("timeout=5", 600)])
def test_ranks_look_for_each_other_as_long_as_the_configuration_says(monkeypatch, capsys, key, seconds):
    def nobody(launch, timeout_s):
        raise LaunchError(f"nobody came for {timeout_s:g} s")

    monkeypatch.setattr(train, "open_job_store", nobody)
    assert train.main(["model.path=x", f"cluster.{key}"]) == 2
    assert f"nobody came for {seconds} s" in capsys.readouterr().err

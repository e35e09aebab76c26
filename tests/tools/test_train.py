import pytest

from deca_ds.errors import LaunchError
from deca_ds.tools import train


@pytest.mark.parametrize(
    ("key", "timeout_s", "meet_s"),
    [("timeout_s=90", 90, 60), ("timeout_s=5", 60, 60), ("meet_s=20", 600, 20), ("timeout=5", 600, 60)],
)
def test_ranks_look_for_each_other_as_long_as_the_configuration_says(monkeypatch, capsys, key, timeout_s, meet_s):
    """One that makes no sense is told by the rank that hosts the store, once the others are there."""

    def nobody(launch, *given):
        raise LaunchError("nobody came for {:g} s of {:g} s".format(*reversed(given)))

    monkeypatch.setattr(train, "open_job_store", nobody)
    assert train.main(["model.path=x", f"cluster.{key}"]) == 2
    assert f"nobody came for {meet_s} s of {timeout_s} s" in capsys.readouterr().err

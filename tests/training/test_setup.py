import pytest

from deca_ds.errors import DataError, LaunchError
from deca_ds.training import main as training_main
from deca_ds.training.setup import compare_data


def test_clients_must_agree_on_labels_and_on_the_common_set():
    same = [{"client": 0, "common_evaluation": 3}, {"client": 1, "common_evaluation": 3}]
    compare_data(same, [["a", "b"], ["a", "b"]])
    with pytest.raises(DataError, match=r"client 1 has \['b', 'a'\]"):
        compare_data(same, [["a", "b"], ["b", "a"]])
    with pytest.raises(DataError, match="3 examples at client 0 and 4 at client 1"):
        compare_data([same[0], {"client": 1, "common_evaluation": 4}], [["a"], ["a"]])


@pytest.mark.parametrize(("key", "seconds"), [("timeout_s=90", 90), ("timeout_s=5", 60), ("timeout=5", 600)])
def test_ranks_look_for_each_other_as_long_as_the_configuration_says(monkeypatch, capsys, key, seconds):
    def nobody(launch, timeout_s):
        raise LaunchError(f"nobody came for {timeout_s:g} s")

    monkeypatch.setattr(training_main, "open_job_store", nobody)
    assert training_main.main(["model.path=x", f"cluster.{key}"]) == 2
    assert f"nobody came for {seconds} s" in capsys.readouterr().err

import pytest

from deca_ds.errors import DataError
from deca_ds.training.compare_clients import compare_data


def test_clients_must_agree_on_labels_and_on_the_common_set():
    same = [{"client": 0, "common_evaluation": 3}, {"client": 1, "common_evaluation": 3}]
    compare_data(same, [["a", "b"], ["a", "b"]])
    with pytest.raises(DataError, match=r"client 1 has \['b', 'a'\]"):
        compare_data(same, [["a", "b"], ["b", "a"]])
    with pytest.raises(DataError, match="3 examples at client 0 and 4 at client 1"):
        compare_data([same[0], {"client": 1, "common_evaluation": 4}], [["a"], ["a"]])

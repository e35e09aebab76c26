"""Counts in words."""

import pytest

from deca_ds.plural import first_few, named, several


def test_one_has_no_plural():
    assert [several(number, "client") for number in (0, 1, 2)] == ["0 clients", "1 client", "2 clients"]


@pytest.mark.parametrize(
    ("count", "told"), [(0, ""), (1, "0"), (3, "0; 1; 2"), (4, "0; 1; 2 and 1 more"), (9, "0; 1; 2 and 6 more")]
)
def test_names_beyond_the_first_few_are_counted(count: int, told: str):
    assert first_few(range(count), 3, "; ") == told


def test_all_of_some_are_named():
    assert [named("client", some) for some in ([3], [3, 4], range(1, 3))] == [
        "client 3",
        "clients 3, 4",
        "clients 1, 2",
    ]
    assert named("rank", range(9), 2) == "ranks 0, 1 and 7 more"

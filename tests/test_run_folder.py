"""What has a number in its name in a run's folder, beside what others have put there."""

from __future__ import annotations

import pytest

from deca_ds.run_folder import BEAT, CLIENT, CLIENT_FAILED, CLIENT_METRICS, JOINED, RANK, STEP, client_metrics, numbered

FOREIGN = (
    "{}.bak",
    "{}.partial",
    "{}~",
    ".{}",
    "copy of {}",
    "client_",
    "client_x",
    "client_-01",
    "client_3",
    "client_0003",
    "client_\u0663\u0663\u0663",
    "rank_old.json",
    "step_other",
    "step_5",
    "FAILED_client_",
)


@pytest.mark.parametrize("name", [CLIENT, RANK, STEP, CLIENT_FAILED, CLIENT_METRICS, BEAT, JOINED])
def test_what_is_foreign_is_left_out(tmp_path, name):
    numbers = (0, 3, 70, 999, 1000, 123_456_789)
    for number in reversed(numbers):
        (tmp_path / name.format(number)).touch()
    for foreign in FOREIGN:
        (tmp_path / foreign.format(name.format(3))).touch()
    assert list(numbered(tmp_path, name).items()) == [(number, tmp_path / name.format(number)) for number in numbers]
    assert numbered(tmp_path / "nowhere", name) == {}


def test_a_file_of_metrics_is_found_by_its_client(tmp_path):
    client_metrics(tmp_path, 12).parent.mkdir()
    client_metrics(tmp_path, 12).touch()
    assert numbered(client_metrics(tmp_path, 12).parent, CLIENT_METRICS) == {12: client_metrics(tmp_path, 12)}

"""The ablation's tables follow from its raw runs, and its statistics are right."""

from __future__ import annotations

import math

import pytest
from jobs import REPOSITORY

FOLDER = REPOSITORY / "examples" / "ablation"
RESULTS = REPOSITORY / "benchmarks" / "ablation"
BASE = {"data.batch_size": 4}
VARIANTS = {
    "first": {},
    "second": {"x": 1},
    "adamw, alone": {"x": 2},
    "adamw, all data": {"x": 3},
    "later": {"x": 4},
    "lost": {"x": 5},
}
STUDIES = {
    "tune": {"key": "lr", "grid": [1.0, 2.0, 4.0], "tuning_seed": 0, "seeds": [0, 1, 2]},
    "base": BASE,
    "datasets": {"news": {}},
    "studies": {"methods": {"datasets": ["news"], "variants": VARIANTS}},
}


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.fixture
def rows():
    """Losses 0.3, 0.4, 0.5 of the first variant at its best rate 2; the others are apart from it as below."""
    from ablation import run_key
    from summary import summarize

    runs = {}

    def add(keys, lr, seed, loss):
        score = {"loss": loss, "accuracy": None if loss is None else 1 - loss, "macro_f1": 0.5}
        record = {"loss": loss, "clients": [score, score], "mean": score, "consensus_distance": 0.1, "steps": 10}
        record |= {"contraction": 0.4, "spectral_gap": 0.5, "bytes_sent_by_a_client": 3e6, "cpu_seconds": 36.0}
        key = run_key(BASE | keys | {"lr": lr, "run.seed": seed})
        runs[key] = record | {"key": key}

    shifts = {"first": (0, 0, 0), "second": (0.1, 0.2, 0.3), "adamw, alone": (0.6,) * 3, "adamw, all data": (-0.2,) * 3}
    for name, shift in shifts.items():
        for seed in range(3):
            add(VARIANTS[name], 2.0, seed, 0.3 + 0.1 * seed + shift[seed])
        add(VARIANTS[name], 1.0, 0, 2.0)
        add(VARIANTS[name], 4.0, 0, None)
    add(VARIANTS["later"], 1.0, 0, 0.1)
    for seed in range(3):
        add(VARIANTS["lost"], 1.0, seed, None)
    ((_, _, found),) = summarize(STUDIES, runs)
    return {row.name: row for row in found}


def test_the_best_learning_rate_is_of_the_tuning_seed(rows):
    assert rows["first"].lr == 2.0 and not rows["first"].at_the_end
    assert rows["first"].tried == {1.0: 2.0, 2.0: 0.3, 4.0: math.inf}
    assert rows["later"].lr is None and not rows["later"].runs, "two of its seeds have not run"


def test_means_and_intervals(rows):
    from summary import clients_loss, clients_mean, difference, gap_closed

    loss = rows["first"].interval(clients_loss)
    half = 4.302652729911275 * 0.1 / math.sqrt(3)  # t of two degrees of freedom; the standard deviation is 0.1
    assert loss.mean == pytest.approx(0.4) and loss.half == pytest.approx(half)
    assert rows["first"].interval(clients_mean("accuracy")).mean == pytest.approx(0.6)
    apart = difference(rows["second"], rows["first"])
    assert apart.mean == pytest.approx(0.2) and apart.half == pytest.approx(half) and not apart.excludes_zero
    apart = difference(rows["adamw, alone"], rows["first"])
    assert apart.mean == pytest.approx(0.6) and apart.half == pytest.approx(0, abs=1e-9) and apart.excludes_zero
    assert difference(rows["later"], rows["first"]) is None
    closed = gap_closed(rows["second"], list(rows.values()), clients_loss)
    assert closed.mean == pytest.approx((0.5 + 0.4 + 0.3) / 0.8 / 3)
    assert gap_closed(rows["adamw, alone"], list(rows.values()), clients_loss).mean == 0
    assert gap_closed(rows["second"], [rows["first"], rows["second"]], clients_loss) is None


def test_settings_with_and_without_a_signal_are_found_by_their_keys(rows):
    from dataclasses import replace

    from summary import pairs_without_signal

    def with_keys(row, **changes):
        return replace(row, variant=replace(row.variant, keys=row.variant.keys | changes))

    without = with_keys(rows["first"], **{"algorithm.method": "gossip-adam"})
    other = with_keys(without, y=1)
    studies = [("methods", "news", [rows["first"], rows["second"], without, other]), ("again", "news", [without])]
    assert list(pairs_without_signal(studies)) == [("methods", "news", rows["first"], without)]


def test_the_table(rows):
    from report import tables

    table = tables([("methods", "news", list(rows.values()))])
    assert "| first | 2 | 10 | 40 | 3 | 0.400 +- 0.248 |  | 0.400 +- 0.248 | 0.10 +- 0.00 | 0.500, 0.400 |" in table
    assert "| later | not run |" in table and "| lost | 1 | diverged at every learning rate |" in table
    assert "| **+0.600 +- 0.000** |" in table
    width = {line.count("|") for line in table.partition("## methods")[2].splitlines() if line.startswith("|")}
    assert len(width) == 1, "a row has other columns than the head"


def test_the_figures(rows, tmp_path):
    pytest.importorskip("matplotlib")
    from plots import draw

    (path,) = draw([("methods", "news", list(rows.values()))], tmp_path)
    assert path.name == "methods.png" and path.read_bytes().startswith(b"\x89PNG")


def test_the_tables_in_the_repository_are_made_from_its_runs():
    from ablation import finished, load_studies
    from report import tables
    from summary import summarize

    made = tables(list(summarize(load_studies(), finished(RESULTS / "runs.jsonl"))))
    assert made == (RESULTS / "tables.md").read_text(), "run python examples/ablation/report.py"

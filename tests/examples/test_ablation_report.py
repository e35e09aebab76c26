"""The ablation's tables follow from its raw runs, and its statistics are right."""

from __future__ import annotations

import math
import shutil
import sys
from dataclasses import replace

import pytest
from jobs import REPOSITORY

from deca_ds.config.schema import GossipConfig
from deca_ds.config.yaml_text import choices
from deca_ds.gossip.schedule import build_mixing

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
    "half lost": {"x": 6},
    "never": {"x": 7},
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
        score = {"loss": loss, "accuracy": 1 - (loss or 0), "macro_f1": 0.5}
        scores = {"clients": [], "mean": None} if loss is None else {"clients": [score, score], "mean": score}
        record = {"loss": loss, **scores, "consensus_distance": 0.1, "steps": 10}
        record |= {"contraction": 0.4 - 0.1 * seed, "spectral_gap": 0.5 + 0.1 * seed, "cpu_seconds": 36.0}
        record["bytes_sent_by_a_client"], record["state_bytes"] = 3e6 * (1 + seed), 2e6
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
        add(VARIANTS["half lost"], 1.0, seed, math.nan if seed == 2 else 0.4)
    ((_, _, found),) = summarize(STUDIES, runs)
    return {row.name: row for row in found}


def test_graphs_that_change_have_no_bound_of_an_averaging():
    from summary import TIME_VARYING

    made = [graph for graph in choices("gossip.graph") if graph != "edge_list"]
    changing = [graph for graph in made if build_mixing(GossipConfig(graph=graph), 8, 0).period > 1]
    assert sorted(TIME_VARYING) == sorted(changing)


def test_the_best_learning_rate_is_of_the_tuning_seed(rows):
    assert rows["first"].lr == 2.0 and not rows["first"].at_the_end
    assert rows["first"].tried == {1.0: 2.0, 2.0: 0.3, 4.0: math.inf}
    assert rows["later"].lr is None and not rows["later"].runs, "two of its seeds have not run"


def test_means_intervals_and_closed_gaps_are_those_computed_by_hand(rows):
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


def test_exact_matches_have_a_table_of_their_own(rows):
    from report import _table

    def answers(run):
        scores = [{"loss": score["loss"], "exact_match": score["accuracy"] / 2} for score in run["clients"]]
        return {**run, "clients": scores, "mean": scores[0]}

    matched = [replace(rows[name], runs=tuple(map(answers, rows[name].runs))) for name in ("first", "second")]
    assert "clients' exact matches, %" not in _table([rows["first"], rows["second"]])
    losses, matches = _table(matched).split("\n\n")
    assert "clients' loss" in losses and matches.startswith("| | clients' exact matches, % | against the first, points")
    assert "| first | 30.0 +- 12.4 |" in matches and "accuracy" not in matches and "macro-F1" not in matches


def test_p_values_are_corrected_for_the_number_of_comparisons(rows):
    from scipy.stats import ttest_1samp
    from summary import corrected

    some = [[0.1, 0.2, 0.3], [0.3, -0.1, 0.2], [1.0, 1.1, 0.9]]
    one, other, small = (ttest_1samp(values, 0).pvalue for values in some)
    assert small < one < other and 3 * small < 2 * one < other
    expected = [2 * one, None, other, 3 * small, None]
    assert corrected([some[0], [], some[1], some[2], [0.0, 0.0, 0.0]]) == pytest.approx(expected)
    # a larger p is never corrected below a smaller one
    assert corrected([some[0], some[0]]) == pytest.approx([2 * one, 2 * one])
    # what has not run yet counts
    assert corrected([some[0], []], planned=3) == pytest.approx([3 * one, None])
    assert corrected([[0.5, 0.5], [0.3]]) == [0.0, None] and corrected([]) == []
    assert corrected([some[1], some[1]]) == pytest.approx([min(1.0, 2 * other)] * 2)


def test_what_depends_on_the_seeds_graph_is_a_mean_over_the_seeds(rows):
    from dataclasses import replace

    row = rows["first"]
    assert row.average("bytes_sent_by_a_client") == pytest.approx(6e6)
    assert row.bound == pytest.approx(1 - 0.6), "of spectral gaps 0.5, 0.6 and 0.7"
    changing = replace(row.variant, keys=row.variant.keys | {"gossip.graph": "one_peer_exponential"})
    assert replace(row, variant=changing).bound is None, "its gap is of a period, not of an averaging"


def test_differences_are_paired_by_seed_and_agreeing_signs_are_counted(rows):
    from summary import agreeing, differences

    assert differences(rows["second"], rows["first"]) == pytest.approx([0.1, 0.2, 0.3])
    assert differences(rows["half lost"], rows["first"]) == [] == differences(rows["never"], rows["first"])
    assert agreeing([0.1, -0.2, 0.3]) == 2 and agreeing([-0.1, -0.2, 0.1]) == 2 and agreeing([0.0, 0.0]) == 0


def test_settings_with_and_without_a_signal_are_found_by_their_keys(rows):
    from dataclasses import replace

    from summary import pairs_without_signal

    def with_keys(row, **changes):
        return replace(row, variant=replace(row.variant, keys=row.variant.keys | changes))

    without = with_keys(rows["first"], **{"algorithm.method": "gossip-adam"})
    other = with_keys(without, y=1)
    studies = [("methods", "news", [rows["first"], rows["second"], without, other]), ("again", "news", [without])]
    assert list(pairs_without_signal(studies)) == [("methods", "news", rows["first"], without)]
    again = [replace(row, variant=replace(row.variant, seeds=(6, 7))) for row in (rows["first"], without)]
    assert list(pairs_without_signal([*studies, ("confirmation", "news", again)]))[1:] == [
        ("confirmation", "news", *again)
    ]


def test_a_study_may_report_seeds_of_its_own(tmp_path):
    """And tunes nothing again: the rate that the tuning seed has chosen holds for them."""
    from ablation import Runner, run_key, variants
    from summary import summarize

    studies = STUDIES | {
        "studies": {"confirmation": {"datasets": ["news"], "seeds": [6, 7], "variants": {"first": VARIANTS["first"]}}}
    }
    (variant,) = variants(studies)
    asked = []

    class Known(Runner):
        def _simulate(self, keys):
            asked.append((keys["lr"], keys["run.seed"]))
            return {"loss": abs(keys["lr"] - 2.0) + 0.1 * keys["run.seed"]}

    assert "best 2, 0.6000, 0.7000" in Known({}, tmp_path, studies["tune"]).run(variant)
    assert asked == [(1.0, 0), (2.0, 0), (4.0, 0), (2.0, 6), (2.0, 7)]
    runs = {
        run_key(variant.keys | {"lr": lr, "run.seed": seed}): {"loss": abs(lr - 2.0) + 0.1 * seed} for lr, seed in asked
    }
    ((_, _, (row,)),) = summarize(studies, runs)
    assert row.lr == 2.0 and [run["loss"] for run in row.runs] == pytest.approx([0.6, 0.7])


def test_the_tables_have_the_numbers_of_the_rows_and_say_what_did_not_finish(rows):
    from report import tables

    runs = {run["key"]: run for row in rows.values() for run in row.runs} | {"superseded": {"cpu_seconds": 3600.0}}
    table = tables([("methods", "news", list(rows.values()))], runs)
    first = "| first | 2 | 10 | 40 | 6 | 2.0 | 0.400 +- 0.248 |  |  |  | 0.400 +- 0.248 | 0.10 +- 0.00 | 0.400, 0.300 |"
    assert first in table
    assert "| **+0.600 +- 0.000** | < 0.001 | 3 of 3 |" in table
    # 0.2 +- 0.248 has p 0.074, the third of seven comparisons, of which four did not run to their end: times five
    assert "| +0.200 +- 0.248 | 0.371 | 3 of 3 |" in table
    assert "| first | 60.0 +- 24.8 |  |  | 50.0 +- 0.0 | 60.0 +- 24.8 |" in table
    assert "| second | 40.0 +- 49.7 | -20.0 +- 24.8 | 0.371 |" in table
    assert "| later | not finished |" in table and "| never | not run |" in table
    assert "| lost | 1, diverged at every learning rate |" in table
    assert "| half lost | 1, diverged at 1 of 3 seeds |" in table
    assert f"{len(runs)} runs took 1.2 CPU hours; {len(runs) - 1} of them are reported" in table  # 18 x 36 s + 1 h
    _, losses, accuracies = table.partition("## methods")[2].split("\n\n")
    for part in (losses, accuracies):
        width = {line.count("|") for line in part.strip().splitlines()}
        assert len(width) == 1, "a row has other columns than the head"


def test_the_first_table_has_the_rows_that_have_run(rows):
    from dataclasses import replace

    from report import FIRST, MARKS, ORDERING, between_marks, first_table

    first, *others = rows.values()
    deca = replace(first, variant=replace(first.variant, name=ORDERING[0]))
    text = first_table([(FIRST, "news", [deca, *others])])
    assert "](accuracy.png)" in text and "never" not in text and "later" not in text
    assert "| deca (descent) | 60.0 +- 24.8 |  | 60.0 +- 24.8 | 0.75 +- 0.00 | 6 | 2.0 |" in text
    assert "| adamw, alone | 0.0 +- 24.8 | **-60.0 +- 0.0** |" in text
    page = f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n"
    assert between_marks(page, text) == f"before\n{MARKS[0]}\n{text}{MARKS[1]}\nafter\n"
    assert first_table([("another", "news", [deca, *others])]) == ""
    for missing in (deca, rows["adamw, alone"], rows["adamw, all data"]):
        assert first_table([(FIRST, "news", [row for row in (deca, *others) if row is not missing])]) == ""


def test_equal_runs_are_said_to_be_equal(rows):
    from dataclasses import replace

    from report import tables

    twin = replace(rows["first"], variant=replace(rows["first"].variant, name="twin"))
    assert "| +0.000 +- 0.000 | the same bits |" in tables([("rounds", "news", [rows["first"], twin])], {})


def test_the_differences_of_the_papers_ordering_have_a_table_of_their_own(rows):
    from dataclasses import replace

    from report import ORDERING, tables

    three = [rows["first"], rows["second"], rows["adamw, alone"]]
    named = [replace(row, variant=replace(row.variant, name=name)) for row, name in zip(three, ORDERING, strict=True)]
    table = tables([("methods", "news", named), ("blocks", "news", three)], {})
    assert "| methods | news | loss | +0.200 +- 0.248 | **+0.400 +- 0.248** | **+0.600 +- 0.000** |" in table
    assert "| methods | news | accuracy, points | -20.0 +- 24.8 | **-40.0 +- 24.8** | **-60.0 +- 0.0** |" in table
    assert "| blocks | news | +" not in table


@pytest.mark.parametrize(
    ("name", "some"),
    [
        ("ablation", {"methods.png", "graphs.png", "traffic.png", "heterogeneity.png"}),
        ("learnable", {"accuracy.png", "moments.png"}),
    ],
)
def test_the_committed_figures_are_those_that_the_runs_make(name, some, tmp_path):
    pytest.importorskip("matplotlib")
    from ablation import finished, load_studies
    from plots import draw
    from summary import summarize

    results = RESULTS.with_name(name)
    for found in results.glob("moments.json"):
        shutil.copy(found, tmp_path)
    studies = list(summarize(load_studies(name), finished(results / "runs.jsonl")))
    names = {path.name for path in draw(studies, tmp_path)}
    assert names >= some
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)
    assert names == {path.name for path in results.glob("*.png")}, "run python examples/ablation/report.py"


def test_the_figure_of_accuracies_needs_both_brackets(rows, tmp_path):
    pytest.importorskip("matplotlib")
    from plots import draw

    found = [rows[name] for name in ("first", "second", "half lost", "never", "adamw, alone")]
    assert draw([("methods, ring", "news", found)], tmp_path) == []
    assert draw([("methods, ring", "news", [*found, rows["adamw, all data"]])], tmp_path) == [tmp_path / "accuracy.png"]


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "plots", raising=False)
    with pytest.raises(SystemExit, match=r"\.\[plots\].*--no-plots"):
        import plots  # noqa: F401


def test_the_head_says_which_seeds_are_tuned_on_and_reported():
    from ablation import load_studies
    from report import head

    text = head("learnable", load_studies("learnable"))
    assert "found on seed 0 by" in text and "seeds 1, 2, 3, 4, 5 are reported" in text and "{" not in text
    assert "The seeds 6, 7, 8, 9, 10, 11, 12, 13, 14, 15 are those of `confirmation, ring`," in text
    assert "are those of" not in head("ablation", load_studies())


def test_without_runs_the_command_that_makes_them_is_named(tmp_path, monkeypatch, capsys):
    from report import main

    monkeypatch.setattr(sys, "argv", ["report.py", "--studies", "learnable", "--results", str(tmp_path)])
    with pytest.raises(SystemExit):
        main()
    assert "ablation.py --studies learnable makes them" in capsys.readouterr().err


def test_runs_of_one_process_are_scored_on_as_much_as_each_asks_for(tiny_model, word_files, tmp_path):
    """Data sets stay loaded from run to run, but not where the evaluation is another one."""
    from ablation import Runner

    runner = Runner({}, tmp_path, {})
    keys = {"model.path": str(tiny_model), "cluster.clients": 2, "data.train": [str(file) for file in word_files]}
    keys |= {"data.common_holdout": 0.3, "data.max_length": 16}
    built = [runner.build(keys | {"evaluation.max_examples": number}) for number in (2, 3, 2)]
    assert [len(simulation.data[0].common_evaluation) for simulation in built] == [2, 3, 2]
    assert built[2].data is built[0].data is not built[1].data


@pytest.mark.parametrize("name", ["ablation", "learnable"])
def test_the_tables_in_the_repository_are_made_from_its_runs(name):
    from ablation import finished, load_studies
    from report import PAGE, between_marks, first_table, head, tables
    from summary import summarize

    results, wanted = RESULTS.with_name(name), load_studies(name)
    runs = finished(results / "runs.jsonl")
    studies = list(summarize(wanted, runs))
    made = head(name, wanted) + tables(studies, runs)
    again = f"run python examples/ablation/report.py --studies {name}"
    assert made == (results / "tables.md").read_text(), again
    if name == "learnable":
        page = PAGE.read_text()
        assert page == between_marks(page, first_table(studies)), again

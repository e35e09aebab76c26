"""`deca report`: what it reads, that its numbers are the run's, and that a page runs nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from run_folders import score, scores, write_job, write_lines, write_simulation

from deca_ds.cli import main
from deca_ds.errors import CheckpointError
from deca_ds.tools.report import charts, figures, page
from deca_ds.tools.report.compare_runs import clients_scores, differences, gaps
from deca_ds.tools.report.network import network
from deca_ds.tools.report.reading import read_runs
from deca_ds.tools.report.summary import averaged, length, score_rows
from deca_ds.tools.report.wording import NONE, redact, rough_duration, setting, short

EVIL = "<script>alert('x')</script>{{ 7 * 7 }}"
LIBRARY = "window.vegaEmbed = async () => ({view: null});"


class Page(HTMLParser):
    """What a browser makes of a report. charts: title of a figure -> its specification, the first with this title."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.style, self._open = "", "", ""
        self.scripts: list[str] = []
        self._titles: dict[str, str] = {}
        self.feed(html)
        drawn = json.loads(self.scripts[0])["charts"]
        self.charts = {title: drawn[place.removesuffix("-title")] for title, place in self._titles.items()}

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._open = ""

    def handle_data(self, data):
        if self._open == "script":
            self.scripts[-1] += data
        elif self._open == "style":
            self.style += data
        elif data.strip():
            self.text += f"{data.strip()}|"
            if (place := self.tags[-1][1].get("id") or "").endswith("-title") and self._open:
                self._titles.setdefault(data, place)


def rendered(*folders: Path) -> str:
    """Without the library that draws, which takes two seconds to be put together."""
    return page.render(read_runs(folders), lambda: LIBRARY)


def report(*folders: Path) -> Page:
    return Page(rendered(*folders))


def points(spec: dict) -> list[dict]:
    return spec["data"]["values"]


def test_a_page_has_the_numbers_of_the_runs_files(tmp_path):
    made = report(write_job(tmp_path / "job"))
    assert "|16 of 16|" in made.text and "|4,800|" in made.text, "3 clients x 16 steps x 100 tokens"
    assert (
        "LlamaForCausalLM of 242,240 parameters with DECA (signal: descent), on 3 ranks (1 a client, CPU)" in made.text
    )
    assert (
        f"|client 1|{score(1, 0):.4f}|{score(1, 16):.4f}|{score(1, 16):.4f} (16)|87.5%|87.5%|87.5% (0)|81.2%|"
        in made.text
    )
    assert "|mean model|1.5000|1.0000|1.0000 (16)|" in made.text
    fifth = {"x": 5, "average": score(1, 5), **{f"c{client}": score(client, 5) for client in range(3)}}
    assert points(made.charts["Training loss"])[4] == pytest.approx(fifth, rel=1e-5)
    assert [row["mean"] for row in points(made.charts["Evaluation loss"])] == [1.5, 1.25, 1.0]
    assert [row["distance"] for row in points(made.charts["Consensus distance"])] == [0, 1 / 16, 1 / 8]
    cells = {(cell["row"], cell["column"]): cell["text"] for cell in points(made.charts["Confusion: mean model"])}
    assert cells == {
        ("login", "login"): "4",
        ("login", "refund"): "",
        ("refund", "login"): "1",
        ("refund", "refund"): "3",
    }
    recall = {(cell["row"], cell["column"]): cell["share"] for cell in points(made.charts["Recall by label"])}
    assert recall["client 2", "refund"] == 0.75 and recall["base", "login"] == 1.0
    data = {(cell["row"], cell["column"]): cell["text"] for cell in points(made.charts["Who has what"])}
    assert data["client 1", "login"] == "8" and data["client 1", "refund"] == "42"
    times = {(bar["row"], bar["part"]): bar["value"] for bar in points(made.charts["Time by phase"])}
    assert times["client 0", "waiting for neighbours"] == 1.0 and times["client 0", "gradient and update"] == 3.0
    assert times["client 0", "evaluation"] == 1.5
    memory = {
        bar["part"]: bar["value"] for bar in points(made.charts["Memory by phase"]) if bar["row"] == "client 0, rank 0"
    }
    assert memory == {"start and loading": 1, "first evaluation": 0, "training": 0, "later evaluations": 0.25}
    spans = [(span["row"], span["from"], span["to"]) for span in points(made.charts["Active blocks"])]
    assert spans == [("layers 0", 0, 4), ("layers 1", 4, 8), ("layers 0", 8, 12), ("layers 1", 12, 16)]
    edges = [edge for layer in made.charts["Graph"]["layer"] for edge in points(layer) if edge.get("edge")]
    assert edges[0]["trip"] == "0.75 ms" and edges[0]["speed"] == "512 MB/s" and edges[0]["sent"] == "16 MB"


def test_a_simulation_is_read_like_a_job(tmp_path):
    (run,) = read_runs([write_simulation(tmp_path / "simulated")])
    assert run.simulated and run.reached == length(run) == 8 and not run.notes
    assert [step.loss for step in run.steps[2]] == [score(2, step) for step in range(1, 9)]
    assert [each.sent for each in run.evaluations[1]] == [None, 16000, 32000]
    assert [scores.loss for _, scores in run.mean_scores] == [1.25, 1.125, 1.0]
    made = report(tmp_path / "simulated")
    assert "simulated in one process" in made.text and "|DONE|" in made.text and "Own evaluation sets" in made.text


def test_torn_lines_and_values_of_other_types_are_left_out(tmp_path):
    folder = write_job(tmp_path / "job")
    with (folder / "metrics/client_001.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 17, "loss": NaN, "block": 3, "tokens": "many", "skipped": {}}\n')
        file.write('[1]\n{"kind": "step", "step": 18, "lo')
    (folder / "data.json").write_text('[{"client": 0,')
    (folder / "heartbeats").mkdir()
    (folder / "heartbeats/rank_0000.json").write_text("{")
    (folder / "metrics/client_002.jsonl").unlink()
    (run,) = read_runs([folder])
    assert run.steps[1][-1].step == 17 and run.steps[1][-1].loss is run.steps[1][-1].tokens is None
    assert run.notes == [
        "metrics/client_001.jsonl: 2 lines cannot be read and are left out",
        "no metrics of client 2 in this folder: not begun, or written on another host",
        "data.json cannot be read and is left out",
    ]
    made = report(folder)
    assert all(note in made.text for note in run.notes) and "|client 2|" not in made.text


JUNK = [
    None,
    True,
    -1,
    10**400,
    1.5,
    "",
    "x",
    "\ud800",
    [],
    [1],
    [["a", "b", -1]],
    {},
    {"a": {"b": [None]}},
    float("nan"),
]


def damaged(value, draw):
    """`value` with some of what is in it missing, or of another type."""
    if draw.random() < 0.06:
        return draw.choice(JUNK)
    if isinstance(value, dict):
        return {key: damaged(of, draw) for key, of in value.items() if draw.random() > 0.02}
    return [damaged(of, draw) for of in value] if isinstance(value, list) else value


@pytest.mark.parametrize("seed", range(6))
def test_whatever_stands_in_the_files_there_is_a_page(tmp_path, seed):
    draw = random.Random(seed)
    folder = write_simulation(tmp_path / "run") if seed % 3 == 0 else write_job(tmp_path / "run", clients=seed)
    for path in folder.rglob("*.json*"):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        path.write_text("\n".join(json.dumps(damaged(json.loads(line), draw)) for line in lines))
    assert "|DONE|" in report(folder).text


def test_a_run_that_has_just_begun_or_was_killed_has_a_page(tmp_path):
    folder = write_job(tmp_path / "job")
    for name in ("DONE", "starts.json", "edges.json", "data.json", "metrics/job.jsonl"):
        (folder / name).unlink()
    (folder / "heartbeats").mkdir()
    beat = {"rank": 0, "host": "n1", "phase": "gossip", "time": 1.75e9}
    (folder / "heartbeats/rank_0000.json").write_text(json.dumps(beat))
    made = report(folder)
    assert "|NO END|" in made.text and "last sign of life 2025-06-15 15:06:40 UTC (rank 0, gossip)" in made.text
    for path in folder.glob("metrics/*"):
        path.unlink()
    assert "|NO END|" in report(folder).text
    (folder / "FAILED").write_text("rank 1 on n2: out of memory")
    made = report(folder)
    assert "|FAILED|" in made.text and "|rank 1 on n2: out of memory|" in made.text


def test_the_page_tells_which_clients_trained_when(tmp_path):
    folder = write_job(tmp_path / "job")
    lines = (folder / "metrics/job.jsonl").read_text()
    gone = {"kind": "membership", "step": 6, "from_step": 6, "clients": [0, 1], "spectral_gap": 0.5, "time": 1.75e9 + 9}
    back = {**gone, "step": 11, "from_step": 11, "clients": [0, 1, 2], "time": 1.75e9 + 20}
    handover = {"kind": "handover", "step": 10, "from_step": 11, "to": 2, "by": 1, "time": 1.75e9 + 21}
    write_lines(folder / "metrics/job.jsonl", [gone, back, handover])
    with (folder / "metrics/job.jsonl").open("a") as file:
        file.write(lines)
    own = [json.loads(line) for line in (folder / "metrics/client_002.jsonl").read_text().splitlines()]
    write_lines(folder / "metrics/client_002.jsonl", [line for line in own if not 6 <= line["step"] < 11])
    (folder / "FAILED_client_002").write_text("rank 2: killed")
    made = report(folder)
    spans = [(span["row"], span["from"], span["to"]) for span in points(made.charts["Who trained when"])]
    assert spans == [("client 0", 0, 16), ("client 1", 0, 16), ("client 2", 0, 5), ("client 2", 10, 16)]
    assert "|client 2 gone: 2 of 3 train, spectral gap 0.5|" in made.text
    assert "|client 2 back: 3 of 3 train, spectral gap 0.5|" in made.text
    assert "|client 2 took over the state of client 1|" in made.text and "|client 2: rank 2: killed|" in made.text
    (run,) = read_runs([folder])
    assert [(step, scores.loss) for step, scores in averaged(run, "common")] == [
        (0, score(1, 0)),
        (8, (score(0, 8) + score(1, 8)) / 2),
        (16, score(1, 16)),
    ]


def test_scores_of_all_on_own_sets_are_not_compared_with_those_before_a_client_left(tmp_path):
    folder = write_job(tmp_path / "job")
    for path in (folder / "metrics").glob("client_*.jsonl"):
        path.write_text(path.read_text().replace('"common"', '"own"'))
    own = [json.loads(line) for line in (folder / "metrics/client_002.jsonl").read_text().splitlines()]
    write_lines(folder / "metrics/client_002.jsonl", [line for line in own if line["step"] < 6])
    gone = {"kind": "membership", "step": 6, "from_step": 6, "clients": [0, 1], "spectral_gap": 0.5, "time": 1.75e9 + 9}
    with (folder / "metrics/job.jsonl").open("a") as file:
        file.write(json.dumps(gone) + "\n")
    (run,) = read_runs([folder])
    mean_model, average, first, *_ = score_rows(run, "own")
    assert mean_model.base is None and average.base is None and first.base is not None
    assert mean_model.best_loss == (16, 1.0) and average.after.loss == (score(0, 16) + score(1, 16)) / 2


def test_scores_of_answers_are_those_of_tokens_and_exact_matches(tmp_path):
    folder = write_job(tmp_path / "job", data__format="alpaca")
    for path in (folder / "metrics").glob("*.jsonl"):
        lines = path.read_text().replace('"macro_f1": 0.8125', '"token_accuracy": 0.75')
        path.write_text(lines.replace('"accuracy": 0.875', '"exact_match": 0.125'))
    made = report(folder)
    assert {"Token accuracy", "Exact match"} <= made.charts.keys() and "Accuracy" not in made.charts
    assert "|75.0%|75.0%|12.5%|12.5%|" in made.text
    assert "exact match, mean model" in made.text


def test_restarts_and_late_neighbours_are_told(tmp_path):
    folder = write_job(tmp_path / "job")
    (start,) = json.loads((folder / "starts.json").read_text())
    again = {**start, "step": 8, "time": start["time"] + 60, "software": {"torch": "2.14.1"}}
    (folder / "starts.json").write_text(json.dumps([start, again]))
    own = (folder / "metrics/client_001.jsonl").read_text().splitlines()
    write_lines(folder / "metrics/client_001.jsonl", [json.loads(line) | {"gossip_skipped": {"2": 5}} for line in own])
    made = report(folder)
    assert "|continued from the checkpoint of step 8|2025-06-15 15:07:40 UTC|" in made.text
    assert "|torch|2.13.0|2.14.1|" in made.text and "|client 1|client 2|5|" in made.text
    memory = [bar["value"] for bar in points(made.charts["Memory by phase"]) if bar["row"] == "client 0, rank 0"]
    assert memory == [1, 0.125, 0, 0.125], "since the last start"


def test_the_length_of_a_run_in_epochs_is_what_its_start_recorded(tmp_path):
    folder = write_job(tmp_path / "job", algorithm__rounds=None, algorithm__epochs=1.5)
    (start,) = json.loads((folder / "starts.json").read_text())
    (folder / "starts.json").write_text(json.dumps([{**start, "rounds": 5, "epochs": 1.5}]))
    (folder / "DONE").unlink()
    (run,) = read_runs([folder])
    assert length(run) == 5 * 2 * 4 and "5 rounds" in report(folder).text


def test_several_runs_stand_beside_each_other(tmp_path):
    deca = write_job(tmp_path / "one" / "run")
    alone = write_job(tmp_path / "two" / "run", gossip__graph="isolated")
    central = write_job(tmp_path / "central", clients=1, optimizer__lr=0.5)
    for folder, loss in ((deca, 1.75), (alone, 2.0), (central, 1.0)):
        for path in folder.glob("metrics/client_*.jsonl"):
            last = {"kind": "evaluation", "step": 16, "common": scores(loss)}
            write_lines(path, [{**last, "step": 0, "common": scores(3.0)}, last])
    runs = read_runs([deca, alone, central])
    assert [run.name for run in runs] == ["one/run", "two/run", "central"]
    gap, *others = gaps(runs)
    assert others == [None, None] and gap.loss == pytest.approx(0.25) and gap.accuracy is None
    assert (gap.alone, gap.central) == ("two/run", "central")
    assert differences(runs, {}) == [
        ("cluster.clients", ["3", "3", "1"]),
        ("gossip.graph", ["ring", "isolated", "ring"]),
        ("optimizer.lr", ["0.001", "0.001", "0.5"]),
    ]
    made = report(deca, alone, central)
    assert "|gap closed, in loss|25%|" in made.text and "Lowest loss: central, 1.0000." in made.text
    assert points(made.charts["Evaluation loss"])[-1]["r0"] == 1.75
    other = write_job(tmp_path / "other data", clients=1, data__train=["b.jsonl"])
    assert gaps(read_runs([deca, alone, other])) == [None] * 3, "no bracket on other examples"


def test_of_many_clients_and_steps_the_mean_and_the_range_are_drawn(tmp_path):
    made = report(write_job(tmp_path / "job", clients=21, steps=320, gossip__graph="exponential"))
    rows = points(made.charts["Training loss"])
    assert len(rows) <= charts.MOST_POINTS and rows[0]["x"] == 2 and rows[-1]["x"] == 320
    first = {end: (score(client, 1) + score(client, 2)) / 2 for end, client in (("low", 0), ("high", 20))}
    assert {end: rows[0][f"average_{end}"] for end in first} == pytest.approx(first, rel=1e-5)
    assert "Each point is the mean of 2 logged steps." in made.text


def test_nothing_that_stands_in_a_run_becomes_markup_or_runs(tmp_path):
    folder = write_job(tmp_path / EVIL.replace("/", " "), labels=(EVIL, "</script><img src=x onerror=alert(1)>"))
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("some/model", json.dumps(EVIL)))
    for path in folder.glob("metrics/*"):
        path.write_text(path.read_text().replace("layers 0", EVIL))
    for name in ("edges.json", "starts.json"):
        (folder / name).write_text((folder / name).read_text().replace("n1", EVIL).replace("CPU", EVIL))
    (folder / "DONE").rename(folder / "FAILED")
    (folder / "FAILED").write_text(EVIL)
    (folder / "FAILED_client_001").write_text(EVIL)
    html = rendered(folder, write_job(tmp_path / "other"))
    made = Page(html)
    assert len(made.scripts) == 3 and made.scripts[1] == LIBRARY
    assert not {"img", "iframe"} & {tag for tag, _ in made.tags}
    assert not [name for _, attributes in made.tags for name in attributes if name.startswith("on")]
    assert "|" + EVIL + "|" in made.text, "as it stands, and not evaluated"
    assert any(cell["column"] == EVIL for cell in points(made.charts["Recall by label"]))
    (policy,) = [a["content"] for tag, a in made.tags if a.get("http-equiv") == "Content-Security-Policy"]
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in made.scripts[1:]]
    assert (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{hashes[0]}' 'sha256-{hashes[1]}';"
        in policy
    )


def test_a_page_needs_no_network(tmp_path):
    made = report(write_job(tmp_path / "a"), write_job(tmp_path / "b"))
    links = [
        attributes.get(name)
        for _, attributes in made.tags
        for name in ("src", "href", "action", "data")
        if name in attributes
    ]
    assert links and all(link.startswith("#") for link in links)
    anchors = {attributes["id"] for _, attributes in made.tags if "id" in attributes}
    assert {link.removeprefix("#") for link in links} <= anchors
    assert "url(" not in made.style and "@import" not in made.style
    assert "fetch" not in made.scripts[2] and "http" not in made.scripts[2]


def test_what_was_shared_out_by_another_column_is_told_by_that_one(tmp_path):
    """And the examples of a label, which nobody has counted, are not said to be none."""
    (run,) = read_runs([write_job(tmp_path / "job", data__partition_column="hospital")])
    (who,), (recall, *_) = figures.partition(run), figures.recall(run)
    assert "by client and hospital;" in who.text
    assert who.spec["encoding"]["x"]["title"] == "hospital"
    assert {cell["trained"] for cell in recall.spec["data"]["values"]} == {NONE}
    (run,) = read_runs([write_job(tmp_path / "by_label")])
    (who,), (recall, *_) = figures.partition(run), figures.recall(run)
    assert "by client and label;" in who.text and "8" in {cell["trained"] for cell in recall.spec["data"]["values"]}


def test_the_same_runs_make_the_same_bytes_without_torch(tmp_path):
    """In another process, where sets have another order."""
    folder = write_job(tmp_path / "job", labels=("zebra", "ape"))
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from deca_ds import cli\n"
        "from deca_ds.tools.report import command\n"
        "assert not {'torch', 'networkx', 'jinja2'} & sys.modules.keys()\n"
        "from deca_ds.tools.report import page\n"
        "from deca_ds.tools.report.reading import read_runs\n"
        f"sys.stdout.write(page.render(read_runs([Path(sys.argv[1])]), lambda: {LIBRARY!r}))\n"
        "assert 'torch' not in sys.modules\n"
    )
    other = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONHASHSEED": "7", "PYTHONIOENCODING": "utf-8"},
        timeout=120,
    )
    assert other.returncode == 0, other.stderr
    assert other.stdout == rendered(folder)


def test_with_the_library_the_command_writes_a_page_that_can_be_drawn(tmp_path, capsys):
    import vl_convert

    output = tmp_path / "page.html"
    assert (
        main(["report", str(write_job(tmp_path / "job")), str(write_simulation(tmp_path / "s")), "-o", str(output)])
        == 0
    )
    assert "open it in a browser" in capsys.readouterr().out
    made = Page(output.read_text(encoding="utf-8"))
    assert "vegaEmbed" in made.scripts[1] and len(made.scripts[1]) > 500_000
    for title, spec in made.charts.items():
        assert vl_convert.vegalite_to_vega(spec)["marks"], title
    assert [path.name for path in tmp_path.glob(".*")] == [], "nothing in part is left"


def test_without_the_library_the_command_names_the_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    page.library.cache_clear()
    assert main(["report", str(write_job(tmp_path / "job")), "-o", str(tmp_path / "page.html")]) == 2
    assert "pip install 'deca_ds[report]'" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_only_a_report_is_overwritten_and_only_by_a_whole_one(tmp_path, capsys, monkeypatch):
    job, output = write_job(tmp_path / "job"), tmp_path / "page.html"
    output.write_text("<html>somebody's own</html>")
    assert main(["report", str(job), "-o", str(output)]) == 2
    assert "is there already, and is no report" in capsys.readouterr().err
    assert output.read_text() == "<html>somebody's own</html>"
    output.unlink()
    assert main(["report", str(job), "-o", str(output)]) == 0
    before = output.read_text(encoding="utf-8")
    (job / "DONE").unlink()
    with monkeypatch.context() as full:
        full.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert main(["report", str(job), "-o", str(output)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert output.read_text(encoding="utf-8") == before and not list(tmp_path.glob(".*"))
    assert main(["report", str(job), "-o", str(output)]) == 0
    assert output.read_text(encoding="utf-8") != before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "there is no folder '{0}/missing'"),
        (["file"], "'{0}/file' is a file"),
        (["foreign"], "'{0}/foreign' is no run's folder: it has no config.yaml"),
        ([""], "name the runs in it: job, list"),
        (["list"], "config.yaml holds no configuration"),
        (["job", "job/metrics"], "'{0}/job/metrics' is no run's folder"),
        (["job", "-o", "foreign"], "'{0}/foreign' is a folder"),
        (["job", "-o", "no/page.html"], "there is no folder '{0}/no'"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(tmp_path, capsys, arguments, message):
    write_job(tmp_path / "job")
    (tmp_path / "file").write_text("")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.yaml").write_text("- a\n")
    before = sorted(tmp_path.rglob("*"))
    given = [word if word == "-o" else str(tmp_path / word) for word in arguments]
    assert main(["report", *given, *([] if "-o" in given else ["-o", str(tmp_path / "page.html")])]) == 2
    assert message.format(tmp_path) in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_configuration_that_no_run_had_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"cluster\.clients = 'many' is no number of clients"):
        read_runs([write_job(tmp_path / "job", cluster__clients="many")])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:secret@host/x", "https://***@host/x"),
        ("s3://bucket/a?X-Amz-Signature=abc&part=1", "s3://bucket/a?X-Amz-Signature=***&part=1"),
        ("https://host/a?access_token=abc", "https://host/a?access_token=***"),
        ("Authorization: Bearer abcdefghijkl", "Authorization: Bearer ***"),
        ("hf_abcdefghijklmnop and sk-abcdefghijklmnop", "*** and ***"),
        ("a@b.c, hf_model, https://host/a?page=2", "a@b.c, hf_model, https://host/a?page=2"),
    ],
)
def test_secrets_are_left_out(text, shown):
    assert redact(text) == shown


def test_times_have_the_unit_that_people_would_use():
    said = [rough_duration(seconds) for seconds in (2e-6, 0.9996, 45.26, 725, 3 * 3600 + 300, 1e6, None)]
    assert said == ["2 us", "1,000 ms", "45.3 s", "12.1 min", "3.08 h", "11.6 days", NONE]


def test_settings_are_written_as_in_yaml():
    assert setting("data.train", ["a", "b"]) == "[a, b]" and setting("gossip.wait_s", None) == "null"
    assert setting("model.tokenizer", "x") == "x" and setting("data.max_length", 512) == "512"
    assert setting("hub.api_key", "abc") == "***" and setting("hub.token", None) == "null"
    assert [short(n) for n in (0, 9999, 12345, 1_250_000, 34_000_000)] == ["0", "9999", "12k", "1.2M", "34M"]


def test_the_graph_of_another_version_or_without_its_file_is_the_measured_one(tmp_path):
    (run,) = read_runs([write_job(tmp_path / "job", gossip__matrix="gone.txt")])
    found = network(run)
    assert [link.ends for link in found.links] == [(0, 1)] and found.gap is None
    made = report(tmp_path / "job")
    assert (
        "3 clients with the mixing matrix gone.txt trained" in made.text
        and "is not there to be read again" in made.text
    )
    (run,) = read_runs([write_job(tmp_path / "new", gossip__shape="torus")])
    assert [link.ends for link in network(run).links] == [(0, 1), (0, 2), (1, 2)]


def test_a_run_that_was_scored_before_training_alone_has_no_scores_after_it(tmp_path):
    folder = write_job(tmp_path / "job")
    for path in (folder / "metrics").glob("*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        write_lines(path, [line for line in lines if line["kind"] != "evaluation" or not line["step"]])
    (run,) = read_runs([folder])
    assert run.reached > 0 and clients_scores(run) is None
    for row in score_rows(run, "common"):
        assert row.base is not None and row.base.loss is not None and row.after.loss is None
    made = report(folder)
    assert "loss, mean model, step 0" in made.text and "→" not in made.text
    assert "The last evaluation came before training." in made.text
    assert not [name for name in made.charts if name.startswith(("Confusion", "Recall"))]


def test_scores_from_before_the_end_name_their_step(tmp_path):
    folder = write_job(tmp_path / "job")
    for path in (folder / "metrics").glob("*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        write_lines(path, [line for line in lines if line["kind"] != "evaluation" or line["step"] < 16])
    made = report(folder)
    assert "loss, mean model, step 8" in made.text and "The last evaluation came after inner step 8." in made.text

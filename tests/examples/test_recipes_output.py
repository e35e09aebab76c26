"""What the page of the recipes shows is what the program prints: its lines and tables are made again, by the code that
a run prints them with, from the figures that stand there."""

from __future__ import annotations

import io
import re
import runpy
from pathlib import Path

import pytest
from rich.console import Console

from deca_ds.config import Config, load_config
from deca_ds.engine.architecture import find_blocks, load_architecture, meta_model
from deca_ds.gossip import agreement, build_mixing
from deca_ds.training.chosen_method import build_schedule
from deca_ds.training.length import tell_length
from deca_ds.training.next_commands import next_commands
from deca_ds.training.scores import Evaluation
from deca_ds.training.summary import print_summary
from deca_ds.training.tables import data_table
from deca_ds.transport.edges import save_edges

FOLDER = Path(__file__).parents[2] / "examples" / "recipes"
STAND_IN = runpy.run_path(str(FOLDER / "stand_in.py"))
RECIPES = {recipe.name: recipe for recipe in STAND_IN["RECIPES"]}
COLUMNS = ("client", "train", "dropped", "cut", "own_evaluation", "common_evaluation", "target_tokens")
EVALUATION = re.compile(
    r"evaluation after step (\d+) of (\d+) \(([\d.]+) s\): (.*?)(?= evaluation after| scores before)"
)
EDGES = re.compile(
    r"slowest of (\d+) edges?: client (\d+) on n0 - client (\d+) on n0, round trip ([\d.]+) ms, ([\d,]+) MB/s"
)


def data(shown: str, tokens: int, drawn: int) -> list[dict]:
    """The clients' data. tokens: of the run, put to the first client's account. drawn: sequences of a client."""
    rows = re.findall(r"^│ +(\d+) │" + r" +([\d,]+) │" * 6 + "$", shown, re.MULTILINE)
    found = [{key: int(value.replace(",", "")) for key, value in zip(COLUMNS, row, strict=True)} for row in rows]
    return [
        row | {"labels": {}, "train_tokens": 0 if row["client"] else tokens * row["train"] / drawn} for row in found
    ]


def scores(loss: str, share: str | None) -> dict[str, float]:
    """share: of exact matches, in percent, where they are counted."""
    return {"loss": float(loss)} | ({} if share is None else {"exact_match": float(share) / 100})


def evaluations(flat: str) -> list[tuple[Evaluation, int, float]]:
    """With the steps of the run, and the seconds. A range of the clients is two of them; the first and the last one
    have all, from the table."""
    exact = r"(?:, exact match ([\d.]+)%(?: to ([\d.]+)%)?)?"
    found = []
    for step, steps, seconds, told in EVALUATION.findall(flat):
        clients: dict[int, dict] = {0: {}, 1: {}}
        for name, *each in re.findall(rf"(own|common) set, clients: loss ([\d.]+)(?: to ([\d.]+))?{exact}", told):
            low, high, few, many = (text or None for text in each)
            clients[0][name], clients[1][name] = scores(low, few), scores(high or low, many or few)
        mean, distance = re.search(rf"mean model: loss ([\d.]+){exact}", told), re.search(r"distance ([\d.e-]+)", told)
        evaluation = Evaluation(int(step), clients, scores(mean[1], mean[2]) if mean else {}, float(distance[1]))
        found.append((evaluation, int(steps), float(seconds)))
    for place in (0, -1):
        evaluation, steps, seconds = found[place]
        every = {}
        for client, row in re.findall(r"client (\d+) +((?:\S+ -> \S+ *)+)", flat.partition("scores before")[2]):
            cells = iter([pair.split(" -> ")[place].rstrip("%") for pair in re.findall(r"\S+ -> \S+", row)])
            names = evaluation.clients[0].items()
            every[int(client)] = {name: scores(next(cells), next(cells) if len(of) > 1 else None) for name, of in names}
        found[place] = Evaluation(evaluation.step, every, evaluation.mean, evaluation.distance), steps, seconds
    return found


def made_again(shown: str, real: Config, stand_in: Config, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """All that a run prints from the table of the data on. real: the recipe. stand_in: with its changes."""
    flat = " ".join(shown.split())
    scored = evaluations(flat)
    steps = scored[0][1]
    mixing = build_mixing(real.gossip, real.cluster.clients, real.run.seed)
    schedule = build_schedule(stand_in, steps // stand_in.algorithm.inner_steps, rounds=1)
    tokens = int(re.search(r"about ([\d,]+) tokens", flat)[1].replace(",", ""))
    summaries = data(shown, tokens, len(schedule) * stand_in.data.batch_size)
    count, one, other, trip, rate = EDGES.search(flat).groups()
    shards = [{"round_trip_ms": float(trip), "mb_per_s": float(rate.replace(",", ""))}]
    edge = {"clients": [int(one), int(other)], "hosts": ["n0", "n0"], "shards": shards}
    Console(width=80, file=(table := io.StringIO())).print(data_table(summaries, real.data.partition_column))
    print_summary([evaluation for evaluation, *_ in scored])
    lines = [
        table.getvalue().rstrip("\n"),
        f"gossip: {mixing.summary()}; {agreement(mixing)}",
        *tell_length(stand_in, schedule, summaries),
        save_edges([edge] * int(count), folder),
        *(evaluation.line(steps, seconds) for evaluation, steps, seconds in scored),
        capsys.readouterr().out.rstrip("\n"),
        f"done: {real.run.output}\n{next_commands(Path(real.run.output), real.cluster.clients)}",
    ]
    return "\n".join(lines)


@pytest.mark.parametrize("name", RECIPES)
def test_the_output_of_a_recipe_is_as_the_program_prints_it(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(FOLDER.parents[1])
    recipe, page = RECIPES[name], (FOLDER / "README.md").read_text(encoding="utf-8")
    shown, file = STAND_IN["shown"](page, name), FOLDER / recipe.file
    real, stand_in = load_config(file), load_config(file, STAND_IN["keys"](recipe, tmp_path))
    assert stand_in.cluster.clients == real.cluster.clients and stand_in.gossip == real.gossip
    files = re.compile(r"data\.[\w\[\]]+: .*|data( of client \d+)?: not used: .*")
    about_files = [line for line in shown.splitlines() if files.fullmatch(line)]
    assert any(line.startswith(("data.train: 1 file: ", "data.per_client[0]: ")) for line in about_files)
    rest = "\n".join(line for line in shown.splitlines() if line not in about_files)
    assert rest == STAND_IN["on_terminal"](made_again(shown, real, stand_in, tmp_path, capsys))
    shape = load_config(file, [f"model.path={FOLDER / 'shapes' / recipe.shape}"])
    blocks = find_blocks(shape, meta_model(shape.model, load_architecture(shape.model))).blocks
    steps = evaluations(" ".join(shown.split()))[0][1]
    assert steps == len(blocks) * stand_in.algorithm.inner_steps, "the blocks are the model's"


def test_every_recipe_for_gpus_has_its_output():
    assert {path.stem for path in FOLDER.glob("*.yaml")} <= RECIPES.keys()
    for name, recipe in RECIPES.items():
        assert "recipes/README.md" in (FOLDER / recipe.file).read_text(encoding="utf-8").split("\n\n")[0], name

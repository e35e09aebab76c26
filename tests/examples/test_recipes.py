"""Recipes for large models fit the GPUs that they name, by shapes that are shipped without weights: the plan that a
recipe's header tells to make says what stands there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from manual import commands

from deca_ds.cli import main
from deca_ds.config import load_config
from deca_ds.engine.architecture import load_architecture, meta_model
from deca_ds.planning.roofline import GPUS, USABLE

REPOSITORY = Path(__file__).parents[2]
EXAMPLES = REPOSITORY / "examples"
RECIPES = [
    *sorted((EXAMPLES / "recipes").glob("*.yaml")),
    EXAMPLES / "llama_7b_multinode.yaml",
    EXAMPLES / "per_client_files.yaml",
]
# billions of parameters
SHAPES = {"qwen_0.5b": 0.49, "qwen_1.5b": 1.54, "llama_7b": 6.74, "llama_8b": 8.03, "llama_70b": 70.55}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_that_of_its_model(shape: str) -> None:
    folder = EXAMPLES / "recipes" / "shapes" / shape
    model = load_config(None, [f"model.path={folder}"]).model
    parameters = meta_model(model, load_architecture(model)).parameters()
    assert sum(each.numel() for each in parameters) / 1e9 == pytest.approx(SHAPES[shape], abs=0.01)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_the_gpu_that_it_names_and_its_header_has_the_plans_numbers(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(REPOSITORY)
    header = path.read_text(encoding="utf-8").split("\n\n")[0]
    (command,) = [words[1:] for words in commands(header) if words[:2] == ["deca", "plan"]]
    main([*command, "--json", f"run.output={tmp_path / 'run'}"])  # without its data, which are on the hub
    plan = json.loads(capsys.readouterr().out)
    told = " ".join(header.replace("\n#", "\n").split())
    most = {at: max(max(block[at].values()) for block in plan["memory"]["blocks"]) for at in ("gpu", "host")}
    assert most["gpu"] <= USABLE * GPUS[command[command.index("--gpu") + 1]].memory
    found = {
        "gpu": re.search(r"a GPU holds ([\d.]+) GB", told),
        "host": re.search(r"a host (?:\d+ x )?([\d.]+) GB", told),
        "disk": re.search(r"([\d.]+) GB of disk a client", told),
    }
    for what, size in (most | {"disk": plan["disk"]["most"]}).items():
        number = found[what]
        assert number is not None or what == "disk", f"{what}: {size / 1e9:.1f} GB"
        if number is not None:
            digits = len(number[1].partition(".")[2])
            assert number[1] == f"{size / 1e9:.{digits}f}", f"{what}: {size / 1e9:.1f} GB"

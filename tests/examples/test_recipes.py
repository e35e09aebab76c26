"""Recipes for large models fit the GPUs that they name, by shapes that are shipped without weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from deca_ds.config import load_config
from deca_ds.engine.load import load_architecture
from deca_ds.gossip.schedule import build_mixing
from deca_ds.planning.estimate import Estimate
from deca_ds.planning.roofline import GPUS, USABLE
from deca_ds.training.chosen_method import check_method

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
PLANS = [
    # recipe, shape, billions of parameters, GPU, what passes may take of it in GB: at least, as the plan tells it
    ("llama_8b_eight_gpus", "llama_8b", 8.03, "RTX4090", 0.9),
    ("llama_8b_two_nodes", "llama_8b", 8.03, "H100", 7.7),
    ("llama_70b_clients_of_eight", "llama_70b", 70.55, "H100", 10.5),
]


def test_every_recipe_is_planned():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {recipe for recipe, *_ in PLANS}


@pytest.mark.parametrize(("recipe", "shape", "billions", "gpu", "passes"), PLANS)
def test_a_recipe_fits_the_gpu_that_it_names(recipe, shape, billions, gpu, passes):
    path = RECIPES / f"{recipe}.yaml"
    config = load_config(path, [f"model.path={RECIPES / 'shapes' / shape}"])
    check_method(config)
    mixing = build_mixing(config.gossip, config.cluster.clients, config.run.seed)
    ranks = min(config.cluster.ranks or [1])
    estimate = Estimate(config, load_architecture(config.model), mixing, ranks, gpu=True)
    assert sum(p.numel() for p in estimate.model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)
    assert gpu in path.read_text(encoding="utf-8")
    assert estimate.at_rest("gpu") + passes * 1e9 <= USABLE * GPUS[gpu].memory

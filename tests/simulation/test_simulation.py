"""The simulator by itself; that it equals real processes is tested in integration/test_numbers.py."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from histories import assert_simulated
from jobs import REPOSITORY
from transformers import AutoModelForCausalLM

import deca_ds
from deca_ds.cli import main
from deca_ds.config import load_config, save_config
from deca_ds.engine.losses import count_targets, token_scores
from deca_ds.engine.masters import rounded
from deca_ds.errors import ConfigError
from deca_ds.simulation.command import contraction, report
from deca_ds.simulation.setup import build
from deca_ds.simulation.simulate import SPREAD_COLUMNS, spread
from deca_ds.tools.report.reading import read_runs


@pytest.fixture
def keys(tiny_model, word_files, tmp_path) -> list[str]:
    return [
        *(f"model.path={tiny_model}", "cluster.clients=6", f"data.train=[{word_files[0]},{word_files[1]}]"),
        *("data.max_length=16", "data.batch_size=2", "data.micro_batch_size=1", "algorithm.rounds=1"),
        *(
            "algorithm.inner_steps=4",
            "algorithm.eps=1e-4",
            "optimizer.lr=0.003",
            "gossip.graph=ring",
            f"run.output={tmp_path / 'run'}",
        ),
        *("data.common_holdout=0.1", "evaluation.max_examples=4", "logging.progress=false"),
    ]


def run(keys):
    simulation = build(load_config(None, keys))
    for _ in simulation.run():
        pass
    return simulation


def test_two_simulations_are_bit_identical_and_learn(keys):
    first, second = run(keys), run([*keys, "gossip.wait_s=0.001"])  # nobody is late in one process
    assert torch.equal(first.clients.values, second.clients.values)
    assert first.steps == second.steps and first.evaluations == second.evaluations
    assert first.evaluations[-1]["mean"]["loss"] < first.evaluations[0]["mean"]["loss"]
    assert first.evaluations[0]["consensus_distance"] == 0 < first.evaluations[-1]["consensus_distance"]


def test_micro_batches_change_nothing(keys):
    keys = [*keys, "algorithm.eps=1e-2"]  # see rounding.py
    clients = run([*keys, "data.micro_batch_size=2"]).clients
    assert_simulated(lambda name, client: dict(clients.parameters(client))[name], keys)


def test_an_averaging_shrinks_the_spread_at_least_by_the_spectral_gap(keys):
    simulation = run([*keys, "gossip.every=2"])
    rho = 1 - simulation.mixing.spectral_gap
    for step in simulation.steps:
        if step["gossip"]:
            assert step["spread_after"] <= step["spread_before"] * rho * 1.001
        else:
            assert step["spread_after"] == step["spread_before"] > 0


@pytest.mark.parametrize("columns", [3, SPREAD_COLUMNS, 2 * SPREAD_COLUMNS + 1])
def test_the_spread_of_close_parameters_is_exact(columns):
    x = 1 + 1e-6 * torch.randn(5, columns, generator=torch.Generator().manual_seed(1))
    exact = x.numpy().astype(np.float64)
    expected = np.sqrt(((exact - exact.mean(axis=0)) ** 2).sum() / 5)
    assert spread(x) == pytest.approx(expected, rel=1e-12) and expected > 0


@pytest.mark.parametrize(
    ("period", "spreads", "told"),
    [
        (
            1,
            [(2.0, 1.0), (2.0, 0.25)],
            "left 25.0% of .* the clients' models; by theory a plain averaging leaves at most 60.0%$",
        ),
        (2, [(2.0, 2.0), (2.0, 0.5)], "left 50.0% .*; by theory 2 plain averagings leave at most 36.0%$"),
        (1, [(2.0, 0.0), (1.0, 0.0)], "after every averaging all clients had the same block"),  # two clients
        (1, [(0.0, 0.0)], "no averaging changed anything"),
    ],
)
def test_what_averagings_did_is_told(period, spreads, told):
    steps = [{"gossip": True, "spread_before": before, "spread_after": after} for before, after in spreads]
    mixing = SimpleNamespace(messages=2, spectral_gap=0.4, period=period)
    assert re.search(told, contraction(SimpleNamespace(steps=steps, mixing=mixing)))


def test_the_table_has_what_classification_is_judged_by(capsys):
    def scores(loss, accuracy, macro_f1):
        return {"common": {"loss": loss, "accuracy": accuracy, "macro_f1": macro_f1}, "own": {"loss": 3.0}}

    clients = [scores(0.5, 0.625, 0.4), scores(0.75, 0.5, 0.375)]
    record = {"step": 8, "clients": clients, "mean": scores(0.25, 0.75, 0.6875)["common"], "consensus_distance": 0.5}
    told = SimpleNamespace(
        config=SimpleNamespace(algorithm=SimpleNamespace(method="deca")),
        mixing=SimpleNamespace(summary=lambda: "ring", messages=0),
        evaluations=[record],
        untrained={},
        steps=[{"bytes_sent": [1e6, 2e6], "gossip": False, "spread_before": 0.0}],
    )
    report(told, 1.0)
    printed = " ".join(word for word in capsys.readouterr().out.split() if word not in "│┃")
    assert "8 loss 3.0000 0.5000 to 0.7500 0.2500 0.5" in printed
    assert "accuracy - 50.0 to 62.5 % 75.0 %" in printed and "macro-F1 - 37.5 to 40.0 % 68.8 %" in printed


def test_a_client_without_a_neighbour_trains_as_if_alone(keys, tmp_path):
    """Client 0 averages with nobody: it trains as if alone, though the others gossip."""
    pairs = np.eye(6)
    pairs[1:, 1:] = 1 / 5
    path = tmp_path / "matrix.txt"
    path.write_text("\n".join(" ".join(map(str, row)) for row in pairs))
    with pytest.raises(Exception, match="falls apart"):
        run([*keys, f"gossip.matrix={path}"])
    simulation = build(load_config(None, keys))
    object.__setattr__(simulation.mixing, "matrices", (pairs,))
    for _ in simulation.run():
        pass
    alone = run([*keys, "gossip.graph=isolated"])
    assert torch.equal(simulation.clients.values[0], alone.clients.values[0])
    assert spread(simulation.clients.values[1:]) < spread(alone.clients.values[1:]) / 5


def test_a_folder_that_is_used_hides_no_mistake(keys, word_files, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "DONE").touch()
    config = tmp_path / "run.yaml"
    config.write_text("{}")

    def told(*changes: str) -> str:
        assert main(["simulate", "--config", str(config), *keys, *changes]) == 2
        return capsys.readouterr().err

    own = ["data.train=[]", "data.common_holdout=0", "cluster.clients=2"]
    assert "is not known" in told("algorithm.method=adamm")
    assert "absent.jsonl" in told(*own, f"data.per_client=[{word_files[0]},absent.jsonl]")
    assert "already used" in told()


def test_the_command_writes_what_happened(keys, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("{}")
    assert main(["simulate", "--config", str(config), *keys, "cluster.clients=5"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "simulation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, 17))
    assert [line["step"] for line in lines if line["kind"] == "evaluation"] == [0, 16]
    assert all(len(line["loss"]) == 5 for line in lines if line["kind"] == "step")
    printed = " ".join(capsys.readouterr().out.split())
    assert "16 inner steps of 5 clients" in printed and "spectral gap" in printed
    told = re.search(r"averaging left (\S+)% of .* models; by theory a plain averaging leaves at most (\S+)%", printed)
    measured, bound = map(float, told.groups())
    assert measured <= bound + 0.1
    (report,) = read_runs([tmp_path / "run"])
    assert not report.notes and [step.loss for step in report.steps[4]] == [
        line["loss"][4] for line in lines if line["kind"] == "step"
    ]
    last = [line for line in lines if line["kind"] == "evaluation"][-1]
    assert report.starts[0].blocks and report.scores(4, "own")[-1][1].loss == last["clients"][4]["own"]["loss"]
    assert main(["simulate", "--config", str(config), *keys]) == 2
    assert "already used" in capsys.readouterr().err


def test_adapters_move_and_the_model_under_them_stays(keys):
    pytest.importorskip("peft")
    simulation = run([*keys, "algorithm.method=dec-lora", "blocks.layers_per_block=null"])
    (block,), values = simulation.clients.plan.blocks, dict(simulation.clients.parameters(1))
    untouched = dict(build(load_config(None, [*keys, "run.output=other"])).clients.parameters(1))
    for name in simulation.clients.plan.frozen:
        assert torch.equal(values[name], untouched[name.replace(".base_layer", "")]), name
    assert all(values[name].any() for name in block.names)
    assert simulation.evaluations[-1]["mean"]["loss"] < simulation.evaluations[0]["mean"]["loss"]


def test_clients_that_are_absent_are_refused(keys):
    with pytest.raises(ConfigError, match="a simulation has all clients from the start"):
        build(load_config(None, [*keys, "cluster.clients=3", "cluster.absent=[1]", "cluster.on_failure=continue"]))


def test_a_parameter_without_a_gradient_stays_and_is_named(keys):
    simulation = build(load_config(None, [*keys, "optimizer.weight_decay=0.1", "gossip.graph=isolated"]))
    clients = simulation.clients
    name = next(name for name in clients.block_names(1) if name.endswith("o_proj.weight"))
    module = clients.model.get_submodule(name.removesuffix(".weight"))
    module.forward = lambda hidden: hidden  # the module does not run
    before = dict(clients.parameters(2))[name].clone()
    for _ in simulation.run():
        pass
    assert torch.equal(dict(clients.parameters(2))[name], before)
    assert simulation.untrained == {clients.plan.blocks[1].label: [name]}


@pytest.mark.parametrize("masters", ["exact", "rounded"])
def test_bfloat16_equals_adam_on_masters_that_live_on_or_are_rounded(keys, masters):
    half = ["model.dtype=bfloat16", f"model.masters={masters}"]
    alone = ["cluster.clients=1", "algorithm.rounds=2", "data.micro_batch_size=2"]
    plain = ["optimizer.clip_norm=0", "optimizer.schedule=constant"]
    config = load_config(None, [*keys, *alone, *plain, *half])
    simulation = build(config)
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.bfloat16)
    batches = simulation.batches(0)
    trained = {name: p.detach().float() for name, p in model.named_parameters()}
    for _ in range(2):
        for block in simulation.clients.plan.blocks:
            adam = torch.optim.Adam([trained[name] for name in block.names], lr=0.003, eps=1e-4)
            for _ in range(4):
                (batch,) = next(batches)
                model.zero_grad()
                (token_scores(model, batch, torch.device("cpu")).losses.sum() / count_targets(batch)).backward()
                for name in block.names:
                    trained[name].grad = model.get_parameter(name).grad.float()
                adam.step()
                for name in block.names:
                    model.get_parameter(name).data.copy_(rounded(trained[name]))
            if masters == "rounded":
                for name in block.names:
                    trained[name].copy_(model.get_parameter(name).detach())
    for _ in simulation.run():
        pass
    for name, values in simulation.clients.parameters(0):
        torch.testing.assert_close(values, trained[name], rtol=0, atol=2e-5)
        assert torch.equal(values, values.bfloat16().float()) == (masters == "rounded")


def test_a_simulation_that_diverges_ends_with_the_real_run_s_message_and_leaves_nothing(keys, tmp_path, capsys):
    (tmp_path / "run.yaml").touch()
    config = ["simulate", "--config", str(tmp_path / "run.yaml"), *keys, "optimizer.clip_norm=0"]
    assert main([*config, "optimizer.lr=1e20"]) == 2
    told = capsys.readouterr().err
    assert "client 0 has diverged: the norm of the block's parameters is not finite" in told
    assert "inner step 1, block embeddings" in told and not (tmp_path / "run").exists()


def test_a_script_gets_what_the_command_writes(keys, tmp_path, capsys):
    config = load_config(None, keys)
    result = deca_ds.simulate(config)
    assert "inner steps of" not in capsys.readouterr().out, "the table is the command's"
    assert main(["simulate", *keys, f"run.output={tmp_path / 'other'}"]) == 0
    own, other = ((tmp_path / name / "simulation.jsonl").read_text() for name in ("run", "other"))
    assert own == other and result.output == tmp_path / "run"
    lines = [line for line in map(json.loads, own.splitlines()) if line["kind"] == "evaluation"]
    assert [each.step for each in result.evaluations] == [line["step"] for line in lines] == [0, 16]
    first, last = result.evaluations
    assert list(last.clients) == list(range(6)) and [*last.clients.values()] == lines[-1]["clients"]
    assert (last.mean, last.distance) == (lines[-1]["mean"], lines[-1]["consensus_distance"])
    assert result.best is (last if last.loss < first.loss else first)
    with pytest.raises(deca_ds.UserError, match="already used"):
        deca_ds.simulate(config)


def test_the_example_for_scripts_runs(keys, tmp_path, monkeypatch, capsys):
    page = (REPOSITORY / "docs/site/api.md").read_text()
    (example,) = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    save_config(load_config(None, keys), tmp_path / "my_run.yaml")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "api.md", "exec"), {})
    printed = capsys.readouterr().out
    for graph in ("ring", "exponential"):
        assert (tmp_path / "runs" / graph / "simulation.jsonl").is_file()
        losses = r"\[" + ", ".join([r"\d\.\d+"] * 6) + r"\]"
        assert re.search(rf"^{graph} mean model: \d\.\d+ clients: {losses} consensus distance: 0\.\d+$", printed, re.M)

"""What the simulator has for a run with a history of deaths and returns, or without one; and with rounding errors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rounding import LOSS, MARGIN, PARAMETER, Noise, assert_close
from torch import Tensor

from deca_ds.algorithm.rule import Rule, State
from deca_ds.config import load_config
from deca_ds.gossip import subset
from deca_ds.simulation.setup import build
from deca_ds.simulation.simulate import Simulation


class NoisyRule:
    """A rule with noise on what its local step leaves."""

    def __init__(self, rule: Rule, noise: Noise):
        self._rule, self._noise = rule, noise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rule, name)

    def local_step(self, state: State, **options: Any) -> None:
        self._rule.local_step(state, **options)
        state["grad"].copy_(torch.from_numpy(self._noise.parameters(state["grad"].double().numpy())))


def add_noise(simulation: Simulation, noise: Noise) -> None:
    """Let it compute with rounding errors, see rounding.py."""
    clients, simulation.rule = simulation.clients, NoisyRule(simulation.rule, noise)  # type: ignore[assignment]
    gradient = clients.gradient

    def noisy_gradient(index: int, client: int, *arguments: Any) -> float:
        exact = clients.values[client].clone()
        clients.values[client] = torch.from_numpy(noise.weights(exact.double().numpy()))
        loss = gradient(index, client, *arguments)
        clients.values[client] = exact
        return loss

    clients.gradient = noisy_gradient  # type: ignore[method-assign]


def simulate(
    keys: list[str],
    deaths: Mapping[int, int] | None = None,
    returns: Mapping[int, tuple[int, int]] | None = None,
    *,
    steps: int | None = None,
    noise: Noise | None = None,
) -> Simulation:
    """The simulation after `steps` inner steps (None: all).

    Client c's death is noticed at inner step deaths[c], and it comes back with the state of client g after inner step
    s, (s, g) = returns[c].
    """
    deaths, returns = deaths or {}, returns or {}
    simulation = build(load_config(None, keys))
    if noise is not None:
        add_noise(simulation, noise)
    original, values = simulation.mixing, simulation.clients.values
    run = simulation.run()
    for number in range(1, (steps or len(simulation.schedule)) + 1):
        gone = [c for c, step in deaths.items() if step <= number <= returns.get(c, (math.inf,))[0]]
        simulation.mixing = subset.without(original, gone)
        next(run)
        for client, (step, giver) in returns.items():
            if step == number:
                values[client] = values[giver]
                for tensor in simulation.state.values():
                    tensor[client] = tensor[giver]
    if steps is None:
        assert next(run, None) is None  # it ends with an evaluation
    return simulation


def assert_simulated(
    read: Callable[[str, int], Tensor],
    keys: list[str],
    deaths: Mapping[int, int] | None = None,
    returns: Mapping[int, tuple[int, int]] | None = None,
    *,
    steps: int | None = None,
    where: str = "",
) -> tuple[Simulation, Simulation]:
    """What the clients that live in the end hold, read(name, client), is the simulator's to rounding.

    Returns the simulation, and the one with noise.
    """
    start = dict(build(load_config(None, keys)).clients.parameters(0))
    exact, noisy = (simulate(keys, deaths, returns, steps=steps, noise=noise) for noise in (None, Noise()))
    living = [c for c in range(exact.clients.clients) if c not in (deaths or {}) or c in (returns or {})]
    held = [[dict(simulation.clients.parameters(client)) for client in living] for simulation in (exact, noisy)]
    assert_close([{name: read(name, client) for name in start} for client in living], *held, start, where)
    return exact, noisy


def assert_mostly_simulated(read: Callable[[str, int], Tensor], keys: list[str]) -> None:
    """What the clients hold is the simulator's, of a bfloat16 model without gossip, or where bfloat16 travels.

    A master that is off by a unit may round to another bfloat16 value, which moves what follows by far more than
    rounding in float32 does: so a hundredth of the elements may be off by more than that.
    """
    simulation, off = simulate(keys), []
    for client in range(simulation.clients.clients):
        for name, values in simulation.clients.parameters(client):
            off.append((read(name, client) - values).abs().flatten())
    share = float((torch.cat(off) > 1e-6).float().mean())
    assert share <= 0.01, f"{share:.1%} of the masters are not the simulator's"


def assert_metrics(run: Path, exact: Simulation, noisy: Simulation) -> None:
    """The metrics of a real run are the simulation's: losses and distances to rounding, all else to the letter."""
    clients = range(exact.clients.clients)
    job, *own = (
        [json.loads(line) for line in (run / "metrics" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("job", *(f"client_{client:03d}" for client in clients))
    )
    scored = [[record for record in records if record["kind"] == "evaluation"] for records in own]
    assert [record["step"] for record in job] == [record["step"] for record in exact.evaluations]
    assert [records[-1]["gossip_bytes_sent"] for records in scored] == exact.steps[-1]["bytes_sent"]
    assert job[0]["step"] > 0 or job[0]["consensus_distance"] == 0, "all start from one model"
    found = {
        "loss": [[record["loss"] for record in records if record["kind"] == "step"] for records in own],
        "mean loss": [record["mean"]["loss"] for record in job],
        "own loss": [[record["own"]["loss"] for record in records] for records in scored],
        "consensus distance": [record["consensus_distance"] for record in job],
    }
    expected, with_noise = (
        {
            "loss": [[record["loss"][client] for record in simulation.steps] for client in clients],
            "mean loss": [record["mean"]["loss"] for record in simulation.evaluations],
            "own loss": [[r["clients"][client]["own"]["loss"] for r in simulation.evaluations] for client in clients],
            "consensus distance": [record["consensus_distance"] for record in simulation.evaluations],
        }
        for simulation in (exact, noisy)
    )
    size = float(exact.clients.values.norm(dim=1).max())  # the distance is off by the rounding of what it is between
    for name, values in expected.items():
        values = np.array(values)
        rounding = PARAMETER * size if name == "consensus distance" else LOSS * values.max()
        tolerance = rounding + MARGIN * np.abs(values - with_noise[name]).max()
        np.testing.assert_allclose(found[name], values, rtol=0, atol=tolerance, err_msg=f"{run.name}: {name}")

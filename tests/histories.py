"""What the simulator has for a history of deaths and returns."""

from __future__ import annotations

import math

import torch

from deca_ds.config import load_config
from deca_ds.gossip import survive
from deca_ds.simulation.setup import build


def simulated(
    keys: list[str], deaths: dict[int, int], returns: dict[int, tuple[int, int]], steps: int | None = None
) -> dict[int, dict[str, torch.Tensor]]:
    """Client -> parameters, where client c's death is noticed at inner step deaths[c], and it comes back with the state
    of client g after inner step s, (s, g) = returns[c]."""
    simulation = build(load_config(None, keys))
    original, values = simulation.mixing, simulation.clients.values
    run = simulation.run()
    for number in range(1, (steps or len(simulation.schedule)) + 1):
        gone = [c for c, step in deaths.items() if step <= number <= returns.get(c, (math.inf,))[0]]
        simulation.mixing = survive.without(original, gone)
        next(run)
        for client, (step, giver) in returns.items():
            if step == number:
                values[client] = values[giver]
                for tensor in run.gi_frame.f_locals["state"].values():
                    tensor[client] = tensor[giver]
    return {client: dict(simulation.clients.parameters(client)) for client in range(simulation.clients.clients)}

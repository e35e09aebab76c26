"""Simulate a run into its folder, for `deca simulate` and for scripts."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.progress import track

from deca_ds.config import Config, Given, load_config, save_config
from deca_ds.config.resume import check_output
from deca_ds.printing import print_wrapped
from deca_ds.run_folder import DATA, SAVED_CONFIG, SIMULATION
from deca_ds.simulation.setup import build, check
from deca_ds.simulation.simulate import Simulation
from deca_ds.training.claim import release, take
from deca_ds.training.config_warnings import config_warnings
from deca_ds.training.notices import print_notes
from deca_ds.training.scores import Evaluation, RunResult
from deca_ds.training.start_log import record_start


def simulate(config: Given, overrides: Sequence[str] = ()) -> RunResult:
    """Train all clients of a configuration in this process, as `deca simulate` does, and write `run.output`.

    config, overrides: see `load_config`. Raises UserErrors: ConfigError before anything is loaded.
    """
    simulation, _ = run_to_folder(load_config(config, overrides))
    evaluations = [
        Evaluation(each["step"], dict(enumerate(each["clients"])), each.get("mean", {}), each["consensus_distance"])
        for each in simulation.evaluations
    ]
    return RunResult(Path(simulation.config.run.output), evaluations)


def run_to_folder(config: Config) -> tuple[Simulation, float]:
    """Run a simulation and write its folder; return it and the seconds that it took. Prints what is to be known of the
    configuration and the data."""
    check(config)
    for warning in config_warnings(config):
        print_wrapped(f"WARNING: {warning}")
    output = Path(config.run.output)
    take(output, partial(check_output, config))
    try:
        simulation = build(config)
        print_notes(list(dict.fromkeys(note for data in simulation.data for note in data.notes)))
        started = time.perf_counter()
        for _ in track(simulation.run(), "simulating", len(simulation.schedule), disable=not config.logging.progress):
            pass
        seconds = time.perf_counter() - started
        write(simulation, output)
    finally:
        release(output)
    return simulation, seconds


def write(simulation: Simulation, output: Path) -> None:
    """Write config.yaml, data.json, starts.json and simulation.jsonl: a line a step and a line an evaluation, all
    clients in each."""
    output.mkdir(parents=True, exist_ok=True)
    save_config(simulation.config, output / SAVED_CONFIG)
    clients = simulation.clients
    record_start(
        simulation.config,
        simulation.mixing,
        done=0,
        rounds=simulation.schedule.rounds,
        architecture=clients.architecture,
        parameters=clients.values.shape[1],
        plan=clients.plan,
    )
    (output / DATA).write_text(json.dumps([data.summary for data in simulation.data], indent=2) + "\n")
    lines = [{"kind": "evaluation", **record} for record in simulation.evaluations]
    lines += [{"kind": "step", **record} for record in simulation.steps]
    lines.sort(key=lambda line: line["step"])
    (output / SIMULATION).write_text("".join(json.dumps(line) + "\n" for line in lines))

"""The ablation: every variant of a file of studies at its own best learning rate, on real data, in the simulator.

    python examples/ablation/ablation.py --data FOLDER [--study NAME ...] [--workers N]
    python examples/ablation/report.py

    python examples/ablation/make_bases.py --data FOLDER --out bases
    python examples/ablation/ablation.py --studies learnable --data FOLDER --bases bases
    python examples/ablation/report.py --studies learnable

A line a run is appended to runs.jsonl in benchmarks/ablation or benchmarks/learnable. What stands there is not run
again, so an interrupted ablation goes on where it stopped; a run that several studies ask for is run once.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

HERE = Path(__file__).parent
BENCHMARKS = HERE.parents[1] / "benchmarks"
STUDIES = ("ablation", "learnable")  # files here, and folders of results in benchmarks/
MAX_EXTENSIONS = 5  # of the grid, each by a factor of 2

Keys = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """One row of a study's table. keys: its whole configuration but the seed and what is tuned. seeds: reported."""

    study: str
    dataset: str
    name: str
    keys: Keys
    seeds: tuple[int, ...]


def load_studies(name: str = "ablation") -> dict[str, Any]:
    """NAME.yaml; DATA and BASES stand for the folders, so that no key of a run depends on where they are."""
    return OmegaConf.to_container(
        OmegaConf.merge(OmegaConf.load(HERE / f"{name}.yaml"), {"data": "DATA", "bases": "BASES"}), resolve=True
    )  # type: ignore[return-value]


def variants(studies: dict[str, Any], wanted: list[str] | None = None) -> Iterator[Variant]:
    """All rows of the wanted studies (all if None), in the file's order."""
    for study, content in studies["studies"].items():
        if wanted and study not in wanted:
            continue
        seeds = tuple(content.get("seeds", studies["tune"]["seeds"]))
        for dataset in content["datasets"]:
            for name, changes in content["variants"].items():
                keys = studies["base"] | studies["datasets"][dataset] | content.get("keys", {}) | changes
                yield Variant(study, dataset, name, _pooled(keys) if keys.pop("pooled", False) else keys, seeds)


def _pooled(keys: Keys) -> Keys:
    """One client with everybody's data and as many samples a step as all clients together."""
    clients = 8
    pooled = keys | {"data.batch_size": keys["data.batch_size"] * clients, "gossip.graph": "ring"}
    if "data.per_client" in keys:
        pooled["data.train"] = pooled.pop("data.per_client")
    pooled.pop("data.partition_column", None)
    return pooled | {"data.partition": "iid"}


def run_key(keys: Mapping[str, Any]) -> str:
    """What tells runs apart: a digest of the configuration, without where the data lies."""
    text = json.dumps(keys, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def finished(path: Path) -> dict[str, dict[str, Any]]:
    """All runs on record, by key."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {record["key"]: record for record in map(json.loads, lines)}


class Runner:
    """Runs variants in one process; data sets stay loaded."""

    def __init__(self, folders: Mapping[str, Path], results: Path, tune: dict[str, Any]):
        self.folders, self.path, self.tune = folders, results / "runs.jsonl", tune
        self._loaded: dict[str, Any] = {}

    def run(self, variant: Variant) -> str:
        """Tune on the tuning seed, then run the variant's seeds at the best value; returns a line for people."""
        scores = {value: self._score(variant, value, self.tune["tuning_seed"]) for value in self.tune["grid"]}
        for _ in range(MAX_EXTENSIONS):
            best = min(scores, key=scores.__getitem__)
            if min(scores) < best < max(scores):
                break
            value = best / 2 if best == min(scores) else best * 2
            scores[value] = self._score(variant, value, self.tune["tuning_seed"])
        best = min(scores, key=scores.__getitem__)
        values = [self._score(variant, best, seed) for seed in variant.seeds]
        return f"{variant.study}/{variant.dataset}/{variant.name}: best {best:g}, " + ", ".join(
            f"{value:.4f}" for value in values
        )

    def _score(self, variant: Variant, value: float, seed: int) -> float:
        """Mean over the clients of the final common loss; infinite for a run that diverged."""
        keys = variant.keys | {self.tune["key"]: value, "run.seed": seed}
        known = finished(self.path)
        record = known.get(run_key(keys)) or self._simulate(keys)
        return record["loss"] if record["loss"] is not None else math.inf

    def build(self, keys: Keys) -> Any:
        """The simulation of a run."""
        from deca_ds.config import load_config
        from deca_ds.engine.tokenizer import load_tokenizer
        from deca_ds.simulation.setup import build, load_data

        config = load_config(None, [f"{key}={self._place(value)}" for key, value in keys.items()])
        sections = ("data.", "model.", "cluster.", "run.", "evaluation.")  # that load_data reads
        parts = {name: value for name, value in keys.items() if name.startswith(sections)}
        where = run_key(parts)
        if where not in self._loaded:
            if len(self._loaded) > 8:
                self._loaded.clear()
            self._loaded[where] = load_data(config, load_tokenizer(config.model))
        return build(config, self._loaded[where])

    def _place(self, value: Any) -> str:
        if isinstance(value, list):
            return "[" + ",".join(map(self._place, value)) + "]"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key}: {word}" for key, word in value.items()) + "}"
        text = "null" if value is None else str(value)
        for name, folder in self.folders.items():
            text = text.replace(name, str(folder))
        return text

    def _simulate(self, keys: Keys) -> dict[str, Any]:
        from deca_ds.errors import DivergedError

        simulation = self.build(keys)
        started = time.process_time()
        contractions = []
        diverged = False
        try:
            for step in simulation.run(evaluate_first=False):
                if step["gossip"] and step["spread_before"] > 0:
                    contractions.append(step["spread_after"] / step["spread_before"])
        except DivergedError:
            diverged = True
        last = {} if diverged else simulation.evaluations[-1]
        clients = [scores["common"] for scores in last.get("clients", [])]
        record = {
            "key": run_key(keys),
            "keys": keys,
            "loss": None if diverged else sum(scores["loss"] for scores in clients) / len(clients),
            "clients": clients,
            "mean": last.get("mean"),
            "consensus_distance": last.get("consensus_distance"),
            "contraction": sum(contractions) / len(contractions) if contractions else None,
            "spectral_gap": simulation.mixing.spectral_gap,
            "bytes_sent_by_a_client": 4 * sum(simulation.sent) / len(simulation.sent),
            "state_bytes": simulation.rule.bytes_per_parameter
            * max(block.numel for block in simulation.clients.plan.blocks),
            "steps": len(simulation.steps),
            "cpu_seconds": time.process_time() - started,
        }
        with open(self.path, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(json.dumps(record) + "\n")
        return record


_runner: Runner


def _start(folders: Mapping[str, Path], results: Path, tune: dict[str, Any]) -> None:
    global _runner
    import torch

    torch.set_num_threads(1)
    _runner = Runner(folders, results, tune)


def _run(variant: Variant) -> str:
    try:
        return _runner.run(variant)
    except Exception as error:
        raise RuntimeError(f"{variant.study}/{variant.dataset}/{variant.name}: {error}") from error


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the ablation.")
    parser.add_argument("--studies", choices=STUDIES, default=STUDIES[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with stories260k/, ag_news/, ...")
    parser.add_argument("--bases", type=Path, default=Path("bases"), help="what make_bases.py has made")
    parser.add_argument("--study", nargs="*", help="only these studies")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--results", type=Path, help="default: benchmarks/STUDIES")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["OMP_NUM_THREADS"] = "1"
    studies = load_studies(arguments.studies)
    folders = {"DATA": arguments.data.resolve(), "BASES": arguments.bases.resolve()}
    results = arguments.results or BENCHMARKS / arguments.studies
    results.mkdir(parents=True, exist_ok=True)
    rows = list(variants(studies, arguments.study))
    started = time.perf_counter()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of the pool, which ends its processes
    with multiprocessing.get_context("spawn").Pool(
        arguments.workers, _start, (folders, results, studies["tune"])
    ) as pool:
        for done, line in enumerate(pool.imap_unordered(_run, rows), start=1):
            print(f"[{done}/{len(rows)}, {time.perf_counter() - started:.0f} s] {line}", flush=True)


if __name__ == "__main__":
    main()

"""What gossip does to Adam's moments: runs of the learnable study, looked at from inside, in the simulator.

    python examples/ablation/moments.py --data FOLDER --bases bases [--lr 3e-3] [--seed 1]

Writes moments.json, which report.py draws, and prints a part of it as a table of Markdown: for each inner step of a
block's activations (printed: the first, second, fourth, eighth and last), the mean over activations and clients of

    |h| / |g|       the signal beside the client's gradient
    h along g       cosine of h with the clients' mean gradient
    h in v          share of (1 - b2) h*h in the second moment that is kept: of the median element
    m along g       cosine of the first moment that is kept with the clients' mean gradient
    step            |theta - theta_half| / (lr sqrt(elements)): 1 is a learning rate for every element
    pulled          |theta' - theta_half| / |theta - theta_half|: the averaging beside the local step

of the active block. Without a signal, h is what "descent" would take. Nothing of a run changes by being looked at: its
numbers are those of the study.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from ablation import BENCHMARKS, Runner, load_studies
from torch import Tensor
from torch.nn.functional import cosine_similarity

DATASET = "news"
SHOWN = {
    "deca (descent)": {},
    "deca (fade)": {"algorithm.signal": "fade"},
    "no signal": {"algorithm.method": "gossip-adam"},
}
COLUMNS = ("|h| / |g|", "h along g", "h in v", "m along g", "step", "pulled")


class Watch:
    """A simulation's rule, with notes. found: inner step since the block became active -> a row for each activation."""

    def __init__(self, rule: Any):
        self._rule = rule
        self._gradients: list[Tensor] = []
        self.found: dict[int, list[tuple[float, ...]]] = defaultdict(list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rule, name)

    def local_step(self, state: dict[str, Tensor], *, inner: int, lr: float, **options: Any) -> None:
        self._gradients.append(state["grad"].clone())
        self._inner, self._lr = inner, lr
        self._rule.local_step(state, inner=inner, lr=lr, **options)

    def accept(self, state: dict[str, Tensor], name: str, mixed: Tensor) -> None:
        theta, half = state["theta"].clone(), state["grad"].clone()
        self._rule.accept(state, name, mixed)
        parts = len(self._gradients) // len(theta)  # a client's steps come one after another, those of its parts too
        g = torch.stack([torch.cat(self._gradients[at : at + parts]) for at in range(0, len(self._gradients), parts)])
        self._gradients.clear()
        self._mean = g.mean(dim=0, keepdim=True)
        # where the rule takes no signal, h is what "descent" would be
        h = state["grad"] if getattr(self._rule, "signal", "none") != "none" else theta - mixed
        b2, step = getattr(self._rule, "b2", 0.99), _norm(theta - half)
        energy = (1 - b2) * h.square()
        self._row = (
            float((_norm(h) / _norm(g)).mean()),
            float(cosine_similarity(h, self._mean).mean()) if bool(h.any()) else 0.0,
            float((energy / (b2 * state["v"] + energy).clamp_min(1e-38)).median()),
            float((step / self._lr / theta.shape[1] ** 0.5).mean()),
            float((_norm(mixed - half) / step).mean()),
        )

    def finish(self, state: dict[str, Tensor], **norms: Any) -> None:
        self._rule.finish(state, **norms)
        along = float(cosine_similarity(state["m"], self._mean).mean())
        self.found[self._inner].append((*self._row[:3], along, *self._row[3:]))


def _norm(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1)


def table(found: dict[str, list[list[float]]]) -> str:
    """A row a method and inner step. found: by method, what `watched` returns."""
    lines = ["| | inner step | " + " | ".join(COLUMNS) + " |", "|---|---:|" + "---:|" * len(COLUMNS)]
    for name, rows in found.items():
        for inner in sorted({0, 1, 3, 7, len(rows) - 1} & set(range(len(rows)))):
            lines.append(f"| {name} | {inner + 1} | " + " | ".join(f"{mean:.2f}" for mean in rows[inner]) + " |")
    return "\n".join(lines)


def watched(simulation: Any) -> list[list[float]]:
    """Run it to its end; returns for each inner step the COLUMNS, means over what `Watch` found."""
    simulation.rule = watch = Watch(simulation.rule)
    for _ in simulation.run(evaluate_first=False):
        pass
    return [torch.tensor(watch.found[k], dtype=torch.float64).mean(dim=0).tolist() for k in sorted(watch.found)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Look at the moments.")
    parser.add_argument("--data", type=Path, required=True, help="folder with ag_news/")
    parser.add_argument("--bases", type=Path, default=Path("bases"), help="what make_bases.py has made")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path, default=BENCHMARKS / "learnable", help="folder for moments.json")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    studies = load_studies("learnable")
    folders = {"DATA": arguments.data.resolve(), "BASES": arguments.bases.resolve()}
    runner = Runner(folders, Path(), studies["tune"])
    base = studies["base"] | studies["datasets"][DATASET] | {"optimizer.lr": arguments.lr, "run.seed": arguments.seed}
    found = {name: watched(runner.build(base | changes)) for name, changes in SHOWN.items()}
    print(table(found))
    content = {"lr": arguments.lr, "seed": arguments.seed, "columns": COLUMNS, "methods": found}
    (arguments.results / "moments.json").write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()
